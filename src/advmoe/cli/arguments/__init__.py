"""The arguments of each command. Nothing here imports torch, so that help, completion and mistakes in a command answer at once."""

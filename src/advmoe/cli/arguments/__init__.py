"""The arguments of each command. Nothing here imports torch, so that help, completion and error messages appear at once."""

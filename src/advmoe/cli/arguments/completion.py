"""The arguments of `advmoe completion`."""

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class CompletionArguments:
    """Print a script that completes commands, flags, choices and paths in a shell.

    bash: eval "$(advmoe completion bash)" in ~/.bashrc. zsh: advmoe completion zsh > DIR/_advmoe, for a DIR in $fpath before
    compinit. fish: advmoe completion fish > ~/.config/fish/completions/advmoe.fish.
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """The shell."""

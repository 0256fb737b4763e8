"""`advmoe completion`."""

import contextlib
import importlib
import io
import re
from dataclasses import dataclass, is_dataclass, make_dataclass
from functools import reduce
from operator import or_
from types import ModuleType
from typing import Annotated, Any, Literal

import tyro

from advmoe.cli.main import COMMANDS as NAMES
from advmoe.cli.parsing import Flat, parse

HELP_TEXTS = "COMPLETION_SPEC = "


@dataclass(frozen=True)
class CompletionArguments:
    """Print a script that completes commands, flags, choices and paths in a shell.

    bash: eval "$(advmoe completion bash)" in ~/.bashrc. zsh: advmoe completion zsh > DIR/_advmoe, for a DIR in $fpath before
    compinit. fish: advmoe completion fish > ~/.config/fish/completions/advmoe.fish.
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """The shell."""


def run(words: list[str]) -> None:
    """`advmoe completion`."""
    print(script(parse(CompletionArguments, "completion", words).shell))


def script(shell: str) -> str:
    """The script, which the parser makes from every command's arguments."""
    words, text = ["--tyro-write-completion", shell, "-"], io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
        tyro.cli(_one_of(_arguments()), prog="advmoe", args=words, config=(Flat, tyro.conf.OmitSubcommandPrefixes))
    return "\n".join(_on_one_line(line) for line in text.getvalue().splitlines())


def _on_one_line(line: str) -> str:
    """In the line of Python that holds all help texts, those of several lines: a shell takes every line for a word of its own."""
    return re.sub(r"\\+n", " ", line) if line.startswith(HELP_TEXTS) else line


def _arguments() -> dict[str, Any]:
    """Command -> the dataclass of its arguments."""
    return {name: _of(importlib.import_module(f"advmoe.cli.{name}")) for name in NAMES}


def _of(module: ModuleType) -> Any:
    """A command's own dataclass; that of a command with commands of its own has one field, for which of them."""
    if hasattr(module, "COMMANDS"):
        return make_dataclass("Command", [("command", _one_of({name: kind for name, (kind, _) in module.COMMANDS.items()}))])
    own = [kind for kind in vars(module).values() if is_dataclass(kind) and getattr(kind, "__module__", "") == module.__name__]
    (kind,) = [kind for kind in own if kind.__name__.endswith("Arguments")]  # type: ignore[union-attr]
    return kind


def _one_of(kinds: dict[str, Any]) -> Any:
    """The choice between subcommands."""
    return reduce(or_, (Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items()))

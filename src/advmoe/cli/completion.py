"""`advmoe completion`."""

import contextlib
import importlib
import io
import re
from dataclasses import is_dataclass, make_dataclass
from functools import reduce
from operator import or_
from types import ModuleType
from typing import Annotated, Any

import tyro

from advmoe.cli.arguments.completion import CompletionArguments
from advmoe.cli.main import COMMANDS as NAMES
from advmoe.cli.parsing import Flat

HELP_TEXTS = "COMPLETION_SPEC = "


def run(arguments: CompletionArguments) -> None:
    """`advmoe completion`."""
    print(script(arguments.shell))


def script(shell: str) -> str:
    """The script, which the parser makes from every command's arguments."""
    words, text = ["--tyro-write-completion", shell, "-"], io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
        tyro.cli(_one_of(_arguments()), prog="advmoe", args=words, config=(Flat, tyro.conf.OmitSubcommandPrefixes))
    return "\n".join(_on_one_line(line) for line in text.getvalue().splitlines())


def _on_one_line(line: str) -> str:
    """Replace the line breaks in the line of Python that holds all help texts: a shell takes each line for a separate word."""
    return re.sub(r"\\+n", " ", line) if line.startswith(HELP_TEXTS) else line


def _arguments() -> dict[str, type]:
    """Command -> the dataclass of its arguments."""
    return {name: _of(importlib.import_module(f"advmoe.cli.arguments.{name}")) for name in NAMES}


def _of(module: ModuleType) -> Any:
    """The dataclass of a command; for a command with subcommands, one with a field for the choice between them."""
    if hasattr(module, "COMMANDS"):
        return make_dataclass("Command", [("command", _one_of(module.COMMANDS))])
    (kind,) = [value for name, value in vars(module).items() if name.endswith("Arguments") and is_dataclass(value)]
    return kind


def _one_of(kinds: dict[str, type]) -> Any:
    """The choice between subcommands."""
    return reduce(or_, (Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items()))

"""`advmoe completion`."""

import contextlib
import importlib
import io
import re
from dataclasses import make_dataclass
from functools import reduce
from operator import or_
from types import ModuleType
from typing import Annotated, Any

import tyro

from advmoe.cli.arguments.completion import CompletionArguments
from advmoe.cli.main import COMMANDS as NAMES
from advmoe.cli.parsing import Flat, arguments_of

HELP_TEXTS = "COMPLETION_SPEC = "


def run(arguments: CompletionArguments) -> None:
    """`advmoe completion`."""
    print(script(arguments.shell))


def script(shell: str) -> str:
    """The script, which tyro generates from the arguments of all commands."""
    commands = {name: _command(importlib.import_module(f"advmoe.cli.arguments.{name}")) for name in NAMES}
    argv, text = ["--tyro-write-completion", shell, "-"], io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
        tyro.cli(_one_of(commands), prog="advmoe", args=argv, config=(Flat, tyro.conf.OmitSubcommandPrefixes))
    return "\n".join(_on_one_line(line) for line in text.getvalue().splitlines())


def _on_one_line(line: str) -> str:
    """Remove the line breaks of the help texts in a line of Python code: a shell would split the line at them."""
    return re.sub(r"\\+n", " ", line) if line.startswith(HELP_TEXTS) else line


def _command(module: ModuleType) -> Any:
    """The dataclass of a command; for a command with subcommands, one with a field for the choice between them."""
    if hasattr(module, "COMMANDS"):
        return make_dataclass("Command", [("command", _one_of(module.COMMANDS))])
    return arguments_of(module)


def _one_of(arguments_types: dict[str, type]) -> Any:
    """A union of subcommands."""
    return reduce(or_, (Annotated[arguments_type, tyro.conf.subcommand(name)] for name, arguments_type in arguments_types.items()))

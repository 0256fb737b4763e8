"""Parses the command line into dataclasses, and defines the arguments that several commands share."""

import importlib
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

import tyro
from tyro._arguments import ArgumentDefinition
from tyro._errors import (  # the only structured form of its errors; the dependency is bounded to the version that has it
    BadValue,
    InstantiationFailure,
    InvalidChoice,
    MissingArgs,
    ParseErrorEvent,
    UnrecognizedArgs,
    on_parse_error,
)

from advmoe import migrations
from advmoe.config import CONFIG_FILE, ComputeConfig, RunConfig, Section, load_run_config, load_yaml
from advmoe.errors import UserError, short_repr
from advmoe.recipes import recipe

Arguments = TypeVar("Arguments")
Flag = tyro.conf.FlagCreatePairsOff[bool]
TYPE_ERRORS = ("no type matching", "invalid literal for int", "could not convert string to float")  # beginnings of messages
IN_WORDS = {"FRACTION": "a number or a fraction such as 8/255"}
Flat: Any = tyro.conf.OmitArgPrefixes  # every field a plain flag: names are unique across the sections


@dataclass(frozen=True)
class Source:
    """Where the configuration is read from. One of the two is needed, except for a run that exists (train --out)."""

    recipe: str | None = None
    """Name of a recipe (`advmoe recipes` lists them)."""
    config: Path | None = None
    """YAML file with the configuration, such as config.yaml in a run's folder."""


@dataclass(frozen=True)
class DeviceOptions:
    """Where a network is computed."""

    device: str = "auto"
    """Torch device; auto uses CUDA if there is a CUDA device."""
    threads: int = 0
    """CPU threads; 0 keeps torch's choice."""

    @property
    def config(self) -> ComputeConfig:
        """The same as a ComputeConfig. Raises UserError if `threads` is out of range."""
        return ComputeConfig(device=self.device, threads=self.threads)


@dataclass(frozen=True)
class DefaultSource:
    """The arguments that decide where the defaults of a run's fields come from."""

    source: Source
    out: Path | None = None


def configured(argv: list[str]) -> RunConfig:
    """The configuration of --recipe, --config or an existing --out, before other flags change it.

    Raises UserError for both or none of the two flags, an unknown recipe, or a file that cannot be read.
    """
    without_help = [argument for argument in argv if argument not in ("-h", "--help")]
    with on_parse_error(partial(_refuse, DefaultSource)):
        parsed, _ = tyro.cli(DefaultSource, args=without_help, config=(Flat,), return_unknown_args=True, add_help=False)
    source = parsed.source
    if source.recipe is not None and source.config is not None:
        raise UserError("--recipe and --config exclude each other")
    if source.recipe is not None:
        return recipe(source.recipe)
    if source.config is not None:
        return load_yaml(source.config)
    if parsed.out is not None and (path := parsed.out / CONFIG_FILE).exists():
        return load_run_config(path)
    if len(without_help) == len(argv):
        raise UserError("give --recipe NAME (advmoe recipes lists them) or --config FILE.yaml")
    return RunConfig()


def read(command: str, argv: list[str]) -> Any:
    """The arguments of a command, by the `read` of its module where that does more than `parse`. Raises UserError as `parse`."""
    module = importlib.import_module(f"advmoe.cli.arguments.{command}")
    return module.read(argv) if hasattr(module, "read") else parse(arguments_of(module), command, argv)


def arguments_of(module: ModuleType) -> Any:
    """The only dataclass of a command's module whose name ends in Arguments."""
    (arguments_type,) = [value for name, value in vars(module).items() if name.endswith("Arguments") and is_dataclass(value)]
    return arguments_type


def parse(arguments_type: type[Arguments], command: str, argv: list[str], default: Arguments | None = None) -> Arguments:
    """The arguments of a command. Raises UserError, in one line, if they are not valid."""
    options: dict[str, Any] = {} if default is None else {"default": default}
    with on_parse_error(partial(_refuse, arguments_type)):
        arguments: Arguments = tyro.cli(arguments_type, args=argv, prog=f"advmoe {command}", config=(Flat,), **options)
    for flag in (argument for argument in argv if argument.startswith("--")):
        if getattr(arguments, flag[2:].replace("-", "_"), None) == ():
            raise UserError(f"{flag} needs a value (see advmoe {command} --help)")
    return arguments


def _refuse(arguments_type: type, event: ParseErrorEvent) -> None:
    """Raise the parser's error as a UserError; tyro prints errors of unknown types."""
    message = _message(arguments_type, event)
    if message is not None:
        raise UserError(f"{message} (see {event.prog} --help)" if event.prog.startswith("advmoe ") else message)


def _message(arguments_type: type, event: ParseErrorEvent) -> str | None:
    match event:
        case UnrecognizedArgs(tokens=tokens) | MissingArgs(unrecognized_tokens=[_, *_] as tokens):
            return _unrecognized(tokens, arguments_type)
        case MissingArgs(missing_arguments=missing):
            return f"missing {', '.join(_name(item.arg) for item in missing)}"
        case InvalidChoice(argument=argument, value=value, choices=choices):
            names = ", ".join(name for name in choices if name != "None")
            return f"{_name(argument)} must be one of {names}, not {short_repr(value)}"
        case BadValue(argument=argument):
            return f"{_name(argument)} needs a value"
        case InstantiationFailure(argument=argument, message=message):
            return message if argument is None else f"{_name(argument)} {_reason(argument, message)}"
    return None


def _name(argument: ArgumentDefinition) -> str:
    return argument.display_name().upper() if argument.is_positional() else argument.display_name()


def _reason(argument: ArgumentDefinition, message: str) -> str:
    """Why a value is invalid: the expected forms, or the project's message.

    Python and tyro describe the value in terms of their types; the project's types, such as `Fraction`, say what would be right.
    None, which optional flags also take, is not worth a mention.
    """
    metavar = str(argument.lowered.metavar).replace("{", "").replace("}", "")
    forms = [IN_WORDS.get(form, form) for form in metavar.split("|") if form != "None"]
    return f"must be {' or '.join(forms)}" if message.startswith(TYPE_ERRORS) else f"is wrong: {message}"


def _unrecognized(tokens: list[str], arguments_type: type) -> str:
    """The message for the first unknown flag or argument, with its present name or similar names."""
    argument = next((token for token in tokens if token.startswith("-")), tokens[0])
    name = argument.partition("=")[0].lstrip("-").replace("-", "_")
    if name in migrations.RENAMED:
        return f"{argument} is now --{migrations.RENAMED[name].replace('_', '-')}"
    similar = get_close_matches(name, _fields(arguments_type), n=2)
    if not argument.startswith("-"):
        return f"unknown argument {short_repr(argument)}"
    hint = f"; did you mean {' or '.join(f'--{flag}' for flag in similar)}?".replace("_", "-") if similar else ""
    return f"unknown flag {short_repr(argument)}{hint}"


def _fields(arguments_type: Any) -> list[str]:
    """Names of a class's fields, including those of its sections."""
    names = []
    for name, hint in get_type_hints(arguments_type).items():
        is_section = isinstance(hint, type) and (is_dataclass(hint) or issubclass(hint, Section))
        names += _fields(hint) if is_section else [name]
    return names

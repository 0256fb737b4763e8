"""From words on the command line to dataclasses, and what many commands take."""

from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
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
from advmoe.config import CONFIG_FILE, RunConfig, Section, load_run_config, load_yaml
from advmoe.errors import UserError, short_repr
from advmoe.recipes import recipe

Arguments = TypeVar("Arguments")
Flag = tyro.conf.FlagCreatePairsOff[bool]
Flat: Any = tyro.conf.OmitArgPrefixes  # every field a plain flag: names are unique across the sections


@dataclass(frozen=True)
class Source:
    """Where a run's configuration comes from."""

    recipe: str | None = None
    """Name of a recipe (`advmoe recipes` lists them)."""
    config: Path | None = None
    """YAML file with the configuration, as a run's folder holds one."""


@dataclass(frozen=True)
class First:
    """What decides where a run's defaults come from."""

    source: Source
    out: Path | None = None


def configured(words: list[str]) -> RunConfig:
    """The configuration that --recipe, --config or an existing --out names, before overrides."""
    quiet = [word for word in words if word not in ("-h", "--help")]
    with on_parse_error(partial(_refuse, First)):
        first, _ = tyro.cli(First, args=quiet, config=(Flat,), return_unknown_args=True, add_help=False)
    source = first.source
    if source.recipe is not None and source.config is not None:
        raise UserError("--recipe and --config exclude each other")
    if source.recipe is not None:
        return recipe(source.recipe)
    if source.config is not None:
        return load_yaml(source.config)
    if first.out is not None and (path := first.out / CONFIG_FILE).exists():
        return load_run_config(path)
    if len(quiet) == len(words):
        raise UserError("give --recipe NAME (advmoe recipes lists them) or --config FILE.yaml")
    return RunConfig()


def parse(kind: type[Arguments], command: str, words: list[str], default: Arguments | None = None) -> Arguments:
    """The arguments of a command. Raises UserError, in one line, for words that it does not take."""
    options: dict[str, Any] = {} if default is None else {"default": default}
    with on_parse_error(partial(_refuse, kind)):
        arguments: Arguments = tyro.cli(kind, args=words, prog=f"advmoe {command}", config=(Flat,), **options)
        return arguments


def _refuse(kind: type, event: ParseErrorEvent) -> None:
    """Raise the parser's complaint as a UserError; complaints of another kind are printed by tyro."""
    message = _message(kind, event)
    if message is not None:
        raise UserError(f"{message} (see {event.prog} --help)" if event.prog.startswith("advmoe ") else message)


def _message(kind: type, event: ParseErrorEvent) -> str | None:
    match event:
        case UnrecognizedArgs(tokens=tokens) | MissingArgs(unrecognized_tokens=[_, *_] as tokens):
            return _unrecognized(tokens, kind)
        case MissingArgs(missing_arguments=missing):
            return f"missing {', '.join(_name(one.arg) for one in missing)}"
        case InvalidChoice(argument=argument, value=value, choices=choices):
            return f"{_name(argument)} must be one of {', '.join(choices)}, not {short_repr(value)}"
        case BadValue(argument=argument):
            return f"{_name(argument)} needs a value"
        case InstantiationFailure(argument=argument, message=message):
            return message if argument is None else f"{_name(argument)} {_reason(argument, message)}"
    return None


def _name(argument: ArgumentDefinition) -> str:
    return argument.display_name().upper() if argument.is_positional() else argument.display_name()


def _reason(argument: ArgumentDefinition, message: str) -> str:
    """Why a value was refused: the parser's message, but what would be right where it lists every alternative that was tried."""
    forms = str(argument.lowered.metavar).replace("{", "").replace("}", "").split("|")
    return f"must be {' or '.join(forms)}" if message.startswith("no type matching") else f"is wrong: {message}"


def _unrecognized(tokens: list[str], kind: type) -> str:
    """The first unknown flag, or else word, with its present name or the nearest ones."""
    word = next((token for token in tokens if token.startswith("-")), tokens[0])
    name = word.partition("=")[0].lstrip("-").replace("-", "_")
    if name in migrations.RENAMED:
        return f"{word} is now --{migrations.RENAMED[name].replace('_', '-')}"
    close = get_close_matches(name, _fields(kind), n=2)
    if not word.startswith("-"):
        return f"unknown argument {short_repr(word)}"
    hint = f"; did you mean {' or '.join(f'--{flag}' for flag in close)}?".replace("_", "-") if close else ""
    return f"unknown flag {short_repr(word)}{hint}"


def _fields(kind: Any) -> list[str]:
    """Names of a class's fields, those of the sections in it included."""
    names = []
    for name, hint in get_type_hints(kind).items():
        inner = isinstance(hint, type) and (is_dataclass(hint) or issubclass(hint, Section))
        names += _fields(hint) if inner else [name]
    return names

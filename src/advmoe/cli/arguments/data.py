"""The arguments of `advmoe data get` and `advmoe data check`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from advmoe.cli.parsing import Flag, parse
from advmoe.config import DataConfig
from advmoe.errors import lookup


@dataclass(frozen=True)
class DataGetArguments:
    """Download cifar10, cifar100 or tinyimagenet, resume an interrupted download, and verify the files."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of the data set."""
    to: Path | None = None
    """Folder to download to; by default data/NAME."""
    source: Annotated[Literal["official", "hub"], tyro.conf.arg(name="from")] = "official"
    """The official address, or the Hugging Face hub (needs pip install 'advmoe[hub]')."""


@dataclass(frozen=True)
class DataCheckArguments:
    """Read a data set as training does, and print its splits and fingerprint."""

    data: DataConfig = field(default_factory=DataConfig)
    json: Flag = False
    """Print one JSON object instead of text."""


COMMANDS: dict[str, type[DataGetArguments | DataCheckArguments]] = {"get": DataGetArguments, "check": DataCheckArguments}


def read(argv: list[str]) -> DataGetArguments | DataCheckArguments:
    """The arguments of one of the two commands. Raises SystemExit after help."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        raise SystemExit(0)
    return parse(lookup(COMMANDS, argv[0], "data command"), f"data {argv[0]}", argv[1:])


def _overview() -> str:
    lines = [f"  {name:9} {arguments_type.__doc__}" for name, arguments_type in COMMANDS.items()]
    return "\n".join(["usage: advmoe data COMMAND ...    (advmoe data COMMAND --help lists its flags)", "", *lines])

"""The arguments of `advmoe watch`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from advmoe.cli.parsing import Flag
from advmoe.errors import UserError


@dataclass(frozen=True)
class WatchArguments:
    """Show the running and finished runs in a folder, until Ctrl-C. If the output is not a terminal, the table is printed once."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A run's folder, or a folder that contains runs at any depth."""
    once: Flag = False
    """Print the table once and exit."""
    interval: float = 5.0
    """Seconds between updates."""

    def __post_init__(self) -> None:
        if not 0.1 <= self.interval <= 86400:
            raise UserError(f"interval must be 0.1 to 86400 seconds, not {self.interval:g}")

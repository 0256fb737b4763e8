"""The arguments of `advmoe predict`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from advmoe.cli.parsing import DeviceOptions, Flag
from advmoe.errors import UserError, check_count


@dataclass(frozen=True)
class PredictArguments:
    """Print the class of each image, the confidence, and the expert of each MoE layer. Files that contain no image are reported,
    and the others are classified."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of a run, a file written by advmoe.save_file, a network of the package (advmoe models), or a name on the hub
    (owner/name)."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE [IMAGE ...]")]
    """Image files, and folders, which are searched at any depth."""
    json: Flag = False
    """Print a JSON list."""
    csv: Flag = False
    """Print CSV."""
    batch_size: int = 64
    """Images in memory at once."""
    runtime: DeviceOptions = field(default_factory=DeviceOptions)

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        if self.json and self.csv:
            raise UserError("give --json or --csv, not both")
        if not self.images:
            raise UserError("give one or more IMAGES: files or folders")

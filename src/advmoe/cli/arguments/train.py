"""The arguments of `advmoe train`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from advmoe.cli.parsing import Flag, Source, configured, parse
from advmoe.config import RunConfig
from advmoe.config.choices import TrackerName


@dataclass(frozen=True)
class TrainArguments:
    """Train a network from a recipe or a configuration file, or continue a run that was stopped. Every field has a flag."""

    source: Source
    run: RunConfig
    out: Path
    """The run's folder; it is created if it does not exist."""
    resume: Flag = False
    """Continue from the folder's last checkpoint."""
    track: TrackerName | None = None
    """Also log metrics to TensorBoard or Weights & Biases, in the run's folder (needs the extra of that name)."""


def read(argv: list[str]) -> TrainArguments:
    default = TrainArguments(source=Source(), run=configured(argv), out=tyro.MISSING)
    return parse(TrainArguments, "train", argv, default)

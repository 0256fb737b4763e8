"""`advmoe train`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from advmoe.commands.parsing import Source, configured, console, device, parse
from advmoe.config import RunConfig
from advmoe.data import load_dataset
from advmoe.errors import lookup
from advmoe.progress import TrainingProgress
from advmoe.training.checkpoint import RunFolder
from advmoe.training.loop import train
from advmoe.training.methods import METHODS


@dataclass(frozen=True)
class TrainArguments:
    """Train a network from a recipe, a configuration file, or where a run left off; any field can be overridden."""

    source: Source
    run: RunConfig
    out: Path
    """The run's folder: made if missing."""
    resume: bool = False
    """Go on from the folder's last checkpoint."""


def run(words: list[str]) -> None:
    default = TrainArguments(source=Source(), run=configured(words), out=tyro.MISSING)
    arguments = parse(TrainArguments, "train", words, default)
    config, terminal = arguments.run, console()
    place = device(config.runtime)
    lookup(METHODS, config.method, "method")
    splits = load_dataset(config.data)
    with TrainingProgress(terminal, config.method, _epochs(config)) as progress:
        history = train(config, splits.to(place), arguments.out, progress, resume=arguments.resume)
    best = RunFolder(arguments.out).best()
    row = history[best.epoch - 1]
    terminal.print(
        f"finished: {len(history)} epochs; best is epoch {best.epoch}, held-out SA {row['val_sa']:.1f} RA {row['val_ra']:.1f}\n"
        f"next: advmoe evaluate {arguments.out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _epochs(config: RunConfig) -> int:
    return config.training.epochs * len(METHODS[config.method].phases)

"""`advmoe train`."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from advmoe.cli.display import TrainingProgress
from advmoe.cli.parsing import Source, configured, console, device, parse
from advmoe.config import RunConfig
from advmoe.data import load_dataset
from advmoe.distributed import process_group, rank
from advmoe.errors import lookup
from advmoe.runs.status import Outcome
from advmoe.training.checkpoint import RunFolder
from advmoe.training.loop import train
from advmoe.training.methods import METHODS
from advmoe.training.observers import Observer
from advmoe.training.trackers import Tracker, TrackerName


@dataclass(frozen=True)
class TrainArguments:
    """Train a network from a recipe, a configuration file, or where a run left off; any field can be overridden."""

    source: Source
    run: RunConfig
    out: Path
    """The run's folder: made if missing."""
    resume: bool = False
    """Go on from the folder's last checkpoint."""
    track: TrackerName | None = None
    """Write figures to TensorBoard or Weights & Biases, too, in the run's folder (needs the extra of that name)."""


def run(words: list[str]) -> None:
    default = TrainArguments(source=Source(), run=configured(words), out=tyro.MISSING)
    arguments = parse(TrainArguments, "train", words, default)
    config, terminal = arguments.run, console()
    place = device(config.runtime)
    lookup(METHODS, config.method, "method")
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_group(place))
        observers = _observers(stack, arguments, terminal) if rank() == 0 else []
        splits = load_dataset(config.data)
        history = train(config, splits.to(place), arguments.out, *observers, resume=arguments.resume)
        if rank() > 0:
            return
    best = RunFolder(arguments.out).best()
    row = history[best.epoch - 1]
    terminal.print(
        f"finished: {len(history)} epochs; best is epoch {best.epoch}, held-out SA {row['val_sa']:.1f} RA {row['val_ra']:.1f}\n"
        f"next: advmoe evaluate {arguments.out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _observers(stack: contextlib.ExitStack, arguments: TrainArguments, terminal: Console) -> list[Observer]:
    """The observers of the run."""
    config = arguments.run
    trackers = [Tracker(arguments.track, arguments.out, config)] if arguments.track else []
    progress = stack.enter_context(TrainingProgress(terminal, config.method, _epochs(config)))
    return [progress, stack.enter_context(Outcome(arguments.out)), *map(stack.enter_context, trackers)]


def _epochs(config: RunConfig) -> int:
    return config.training.epochs * len(METHODS[config.method].phases)

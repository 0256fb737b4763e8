"""`advmoe train`."""

import contextlib
import shlex

from rich.console import Console

from advmoe import extension
from advmoe.cli.arguments.train import TrainArguments
from advmoe.cli.device import set_up_device
from advmoe.cli.display import TrainingProgress
from advmoe.cli.streams import console
from advmoe.data import load_dataset
from advmoe.distributed import on_rank_zero, process_group, rank
from advmoe.files import check_folder
from advmoe.runs.failure import FailureRecorder
from advmoe.training.checkpoint import RunFolder
from advmoe.training.loop import train
from advmoe.training.methods import lookup_method, total_epochs
from advmoe.training.observers import Observer
from advmoe.training.trackers import Tracker


def run(arguments: TrainArguments) -> None:
    config, terminal = arguments.run, console()
    torch_device = set_up_device(config.runtime)
    lookup_method(config.method)
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_group(torch_device))
        on_rank_zero(lambda: check_folder(arguments.out, "the run"))  # before the data is read
        observers = _observers(stack, arguments, terminal) if rank() == 0 else []
        splits = load_dataset(config.data)
        history = train(config, splits.to(torch_device), arguments.out, *observers, resume=arguments.resume)
        if rank() > 0:
            return
    best = RunFolder(arguments.out).best()
    row = history[best.epoch - 1]
    epochs = "1 epoch" if len(history) == 1 else f"{len(history)} epochs"
    terminal.print(
        f"finished: {epochs}; best is epoch {best.epoch}, SA {row['val_sa']:.1f} RA {row['val_ra']:.1f} on "
        f"{len(splits.val)} held-out images\n"
        f"next: {extension.command()} evaluate {shlex.quote(str(arguments.out))}",
        soft_wrap=True,
    )  # fmt: skip


def _observers(stack: contextlib.ExitStack, arguments: TrainArguments, terminal: Console) -> list[Observer]:
    """The observers of the run: the progress, the run's state in its folder, and the tracker if there is one."""
    config = arguments.run
    trackers = [Tracker(arguments.track, arguments.out, config)] if arguments.track else []
    progress = stack.enter_context(TrainingProgress(terminal, config.method, total_epochs(config)))
    return [progress, stack.enter_context(FailureRecorder(arguments.out)), *map(stack.enter_context, trackers)]

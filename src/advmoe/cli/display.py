"""Displays the progress of training and evaluation on the console."""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from advmoe.evaluation.store import Shard, stored_shards
from advmoe.training.manifest import EpochRow
from advmoe.training.observers import Observer
from advmoe.training.steps import Metrics
from advmoe.training.totals import image_count
from advmoe.wording import duration

REFRESH = 0.5  # seconds between two readings of the metrics; each one synchronises the device


class TrainingProgress(Observer):
    """A live line (epoch, rate, remaining time, losses, load), and a printed line for each epoch."""

    def __init__(self, console: Console, name: str, epochs: int) -> None:
        self.console, self.name, self.epochs = console, name, epochs
        self.progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=16), MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"), TimeRemainingColumn(compact=True), console=console, transient=True,
            redirect_stderr=sys.stderr.isatty(),
        )  # fmt: skip
        self.task = self.progress.add_task(name, total=None, state="starting")
        self.read, self.started = 0.0, time.monotonic()
        self.first = self.done = -1  # iterations of the epoch: the first one of this process, and the last one
        self.epoch_seconds: list[float] = []  # of the epochs trained by this process

    def __enter__(self) -> "TrainingProgress":
        return self  # the live line starts with the first iteration, so that an error before it is the only output

    def __exit__(self, *_: object) -> None:
        if self.progress.live.is_started:
            self.progress.stop()

    def iteration(self, epoch: int, done: int, total: int, sums: Metrics, images: int) -> None:
        self.progress.update(self.task, completed=(epoch - 1) * total + done, total=self.epochs * total)
        now = time.monotonic()
        if done != self.done + 1:  # an epoch begins, or goes on from a checkpoint
            self.first, self.started = done, now
            self.progress.start()
        self.done = done
        if now - self.read >= REFRESH:
            self.read = now
            rate = f"{(done - self.first) / (now - self.started):.1f} it/s" if done > self.first else ""
            state = " ".join([rate, *_losses(sums, images), _load(sums)])
            self.progress.update(self.task, description=f"{self.name} epoch {epoch}/{self.epochs}", state=state)

    def epoch(self, row: EpochRow) -> None:
        load = f"  busiest expert {max(max(layer) for layer in row['load']):.0%}" if "load" in row else ""
        rate = row["iterations"] / max(row["train_seconds"], 1e-9)
        self.epoch_seconds.append(row["train_seconds"] + row.get("validate_seconds", 0.0))
        seconds = (self.epochs - row["epoch"]) * sum(self.epoch_seconds) / len(self.epoch_seconds)
        remaining = f"  {duration(seconds)} left" if seconds else ""
        self.progress.console.print(
            f"{self.name}  epoch {row['epoch']}/{self.epochs}  loss {row['loss']:.3f}  held-out SA {row['val_sa']:.1f} "
            f"RA {row['val_ra']:.1f}  {rate:.1f} it/s{load}{remaining}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


class EvaluationProgress:
    """A live line with the worst case so far. `attacked` is a `progress` function of `evaluate`.

    If the output is not a terminal, a line is printed for each attack if `log` is true.
    """

    def __init__(self, console: Console, name: str, shards: int, *, log: bool = False) -> None:
        self.name, self.shards = name, shards
        self.log = log and not console.is_terminal
        self.survivors: dict[int, int] = {}
        self.images: dict[int, int] = {}
        columns = (TextColumn("{task.description}", markup=False), SpinnerColumn(), TimeElapsedColumn())
        self.progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )  # else it leaves a blank line
        self.task = self.progress.add_task(f"{name}: attacking")

    def __enter__(self) -> "EvaluationProgress":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def attacked(self, attack: str, number: int, shard: Shard, log: bool = True) -> None:
        """Update after an attack on a shard."""
        self.survivors[number] = len(set(shard.correct or []) - set(shard.ever))
        self.images[number] = len(shard.rows)
        worst = f"{sum(self.survivors.values())} of {sum(self.images.values())} images withstand every attack so far"
        text = f"{self.name}: shard {number + 1}/{self.shards} {attack} done; {worst}"
        self.progress.update(self.task, description=text)
        if log and self.log:
            self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stored(self, folder: Path) -> None:
        """Update after attacks of earlier calls and other processes, read from the store in `folder`."""
        for number, shard in stored_shards(folder):
            self.attacked(list(shard.attacks)[-1] if shard.attacks else "", number, shard, log=False)


def _losses(sums: Metrics, images: int) -> list[str]:
    names = {"loss": "loss", "router_loss": "router loss"}
    return [f"{label} {float(sums[name] / image_count(name, sums, images)):.3f}" for name, label in names.items() if name in sums]


def _load(sums: Metrics) -> str:
    if "load" not in sums:
        return ""
    shares = sums["load"] / sums["load"].sum(dim=1, keepdim=True)
    return f"load {shares.min().item():.0%}-{shares.max().item():.0%}"

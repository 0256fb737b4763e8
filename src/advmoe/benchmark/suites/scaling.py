"""Weak scaling: images per second of K processes with a batch K times as large, compared with one process. 10 minutes.

Every process has one thread (on CUDA, one device). `advmoe train` runs under torchrun, as a user starts it. Runs with different
numbers of processes take turns. Rates are those of the second epoch.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from advmoe.benchmark.rows import Row, compare
from advmoe.benchmark.setup import Setup
from advmoe.errors import UserError

METHODS = ("at_dense", "advmoe")
PROCESSES = (1, 2)
IMAGES = 640  # of each process and epoch
BATCH = 64  # of each process
WIDTH = 16
TARGETS = {"advmoe": ">= 1.6"}  # with synchronised norms


def measure(setup: Setup) -> Iterator[Row]:
    """All numbers of processes in turn, in every round; with several processes, with and without synchronised norms."""
    variants: dict[str, tuple[int, tuple[str, ...]]] = {"1 process": (1, ())}
    for count in PROCESSES[1:]:
        variants |= {f"{count} processes": (count, ()), f"{count} processes, --no-sync-norm": (count, ("--no-sync-norm",))}
    width, images = (4, 2 * BATCH) if setup.quick else (WIDTH, IMAGES)
    for method in METHODS:
        rates: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(setup.rounds(3)):
            for name, (count, flags) in variants.items():
                rates[name].append(images_per_second(method, count, images, width, flags))
        case = f"{method}, ResNet-18 of width {width}, batch {BATCH} a process"
        first, *others = rates
        targets = [(other, first, TARGETS.get(method) if not variants[other][1] else None) for other in others]
        yield from compare("scaling", case, "images/s", rates, targets)


def images_per_second(method: str, processes: int, images: int, width: int, flags: tuple[str, ...]) -> float:
    """Images per second of one run, over all processes. Raises UserError if the run fails."""
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "advmoe")
    run = TrainingRun(method, width, images * processes, BATCH * processes, threads=1, flags=flags)
    seconds = seconds_of_second_epoch(launch, run)
    return images * processes / seconds


@dataclass(frozen=True)
class TrainingRun:
    """A run of `advmoe train` on `images` embedded images, with more `flags`."""

    method: str
    width: int
    images: int
    batch: int
    threads: int
    flags: tuple[str, ...] = ()


def seconds_of_second_epoch(launch: Sequence[str], run: TrainingRun, environment: Mapping[str, str] | None = None) -> float:
    """Wall time of the iterations of an epoch of `advmoe train`, started by `launch`. The first epoch warms up.

    Raises UserError if the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = {
            "recipe": f"fashion-mnist-resnet18-{run.method}", "width": run.width, "limit-train": run.images, "limit-test": 20,
            "batch-size": run.batch, "epochs": 2, "tied-share": 0.0, "threads": run.threads, "out": out,
        }  # fmt: skip
        arguments = [argument for name, value in settings.items() for argument in (f"--{name}", str(value))]
        command = [sys.executable, *launch, "train", *arguments, *run.flags]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if ended.returncode != 0:
            lines = [line for line in ended.stderr.splitlines() if line.startswith("advmoe:")] or ["without a message"]
            raise UserError(f"a training run ended with status {ended.returncode} ({lines[0]})")
        return float(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["train_seconds"])

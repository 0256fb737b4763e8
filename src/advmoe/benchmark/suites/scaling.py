"""Weak scaling: images per second of K processes with a batch K times as large, compared with one process. 12 minutes.

Every process has one thread (on CUDA, one device). `advmoe train` runs under torchrun, as a user starts it. Runs with different
numbers of processes take turns. Rates are those of the second epoch. K separate runs at the same time send each other nothing, so
their rate is the most that the machine allows.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from advmoe.benchmark.rows import Row, compare
from advmoe.benchmark.setup import Setup
from advmoe.errors import UserError

METHODS = ("at_dense", "advmoe")
IMAGES = 640  # of each process and epoch
BATCH = 64  # of each process
WIDTH = 16
TARGETS = {("advmoe", "2 processes"): ">= 1.6"}


@dataclass(frozen=True)
class Launch:
    """`runs` runs at the same time, each of so many processes with these flags."""

    runs: int = 1
    processes: int = 1
    flags: tuple[str, ...] = ()


LAUNCHES = {
    "1 process": Launch(),
    "2 processes": Launch(processes=2),
    "2 processes, --no-sync-norm": Launch(processes=2, flags=("--no-sync-norm",)),
    "2 separate runs": Launch(runs=2),
}


def measure(setup: Setup) -> Iterator[Row]:
    """All LAUNCHES in turn, in every round."""
    width, images = (4, 2 * BATCH) if setup.quick else (WIDTH, IMAGES)
    for method in METHODS:
        rates: dict[str, list[float]] = {name: [] for name in LAUNCHES}
        for _ in range(setup.rounds(3)):
            for name, launch in LAUNCHES.items():
                rates[name].append(images_per_second(method, launch, images, width, setup.device))
        case = f"{method}, ResNet-18 of width {width}, batch {BATCH} a process"
        first, *others = LAUNCHES
        yield from compare("scaling", case, "images/s", rates, [(other, first, TARGETS.get((method, other))) for other in others])


def images_per_second(method: str, launch: Launch, images: int, width: int, device: torch.device) -> float:
    """Images per second over all processes of all runs, with `images` for each process. Raises UserError if a run fails."""
    command = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={launch.processes}", "-m", "advmoe")
    images, batch = images * launch.processes, BATCH * launch.processes
    run = TrainingRun(method, width, images, batch, device, threads=1, flags=launch.flags)
    with ThreadPoolExecutor(launch.runs) as pool:
        seconds = pool.map(lambda _: seconds_of_second_epoch(command, run), range(launch.runs))
        return sum(run.images / passed for passed in seconds)


@dataclass(frozen=True)
class TrainingRun:
    """A run of `advmoe train` on `images` embedded images, with more `flags`."""

    method: str
    width: int
    images: int
    batch: int
    device: torch.device
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
            "batch-size": run.batch, "epochs": 2, "tied-share": 0.0, "device": run.device, "threads": run.threads, "out": out,
        }  # fmt: skip
        arguments = [argument for name, value in settings.items() for argument in (f"--{name}", str(value))]
        command = [sys.executable, *launch, "train", *arguments, *run.flags]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if ended.returncode != 0:
            lines = [line for line in ended.stderr.splitlines() if line.startswith("advmoe:")] or ["without a message"]
            raise UserError(f"a training run ended with status {ended.returncode} ({lines[0]})")
        return float(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["train_seconds"])

"""Training iterations under each policy of OpenMP's waiting threads, alone and beside a busy process. More than 5 minutes.

A thread that waits for the others can spin, which holds its core, or sleep. `advmoe` lets it spin 1,000 times and then sleep,
unless the user has set OMP_WAIT_POLICY or GOMP_SPINCOUNT.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import torch

from advmoe.benchmark.rows import Row, compare
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.suites.scaling import TrainingRun, seconds_of_second_epoch

DEFAULT = "1,000 spins"
POLICIES = {
    DEFAULT: {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},  # no spin
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},  # what libgomp spins where no policy is set
    "active": {"OMP_WAIT_POLICY": "active"},
}
WIDTH, BATCH, ITERATIONS = 16, 64, 6


def measure(setup: Setup) -> Iterator[Row]:
    """All policies in turn, round by round: first alone, then beside one process that computes without a pause."""
    threads = torch.get_num_threads()
    width, iterations = (4, 2) if setup.quick else (WIDTH, ITERATIONS)
    run = TrainingRun("advmoe", width, BATCH * iterations, BATCH, setup.device, threads)
    inherited = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for beside in ("alone", "beside a busy process"):
        seconds: dict[str, list[float]] = {name: [] for name in POLICIES}
        for _ in range(setup.rounds(3)):
            for name, policy in POLICIES.items():
                with _neighbour() if beside != "alone" else contextlib.nullcontext():
                    epoch = seconds_of_second_epoch(("-m", "advmoe"), run, inherited | policy)
                seconds[name].append(epoch / iterations)
        case = f"AdvMoE iteration, ResNet-18 of width {width}, batch {BATCH}, {threads} threads, {beside}"
        yield from compare("waiting", case, "s", seconds, [(name, DEFAULT, None) for name in POLICIES if name != DEFAULT])


@contextlib.contextmanager
def _neighbour() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()

"""Where the runs of a sweep run: on this machine, on a Ray cluster, through Slurm."""

import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from advmoe.data import cores
from advmoe.errors import UserError
from advmoe.sweep.job import Job, ending, start, stop

POLL = 0.5  # seconds between looks at the runs
MOST_WORKERS = 4  # on a CPU, by default


class Placement(Protocol):
    """Takes jobs and says how they ended. A run's folder must be at the same path wherever its job is placed."""

    what: str
    """In words, for the plan."""
    workers: int
    """How many jobs run at once, as far as is known."""
    threads: int
    """CPU threads of each."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs to be run, in this order, as places become free."""

    def ended(self) -> Mapping[str, str | None]:
        """The jobs that ended since the last call: name -> the line a job failed with, or None."""

    def close(self) -> None:
        """End what still runs, and forget what waits."""


class Local:
    """Processes on this machine, at most `workers` at once; devices and threads are shared out among them."""

    def __init__(self, workers: int, threads: int, devices: Sequence[str]) -> None:
        self.workers, self.threads = workers, threads
        self.places = deque(devices[worker % len(devices)] for worker in range(workers))
        self.waiting: deque[Job] = deque()
        self.refused: dict[str, str | None] = {}
        self.running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
        self.what = f"{workers} workers of {threads} threads on {', '.join(dict.fromkeys(self.places))}"

    def submit(self, jobs: Sequence[Job]) -> None:
        self.waiting.extend(jobs)
        self._fill()

    def ended(self) -> Mapping[str, str | None]:
        found = {}
        for name, (job, process) in list(self.running.items()):
            status = process.poll()
            if status is not None:
                stop(process)
                found[name] = ending(job, status)
                self.places.append(job.config.runtime.device)
                del self.running[name]
        self._fill()
        found, self.refused = found | self.refused, {}
        return found

    def close(self) -> None:
        self.waiting.clear()
        for _, process in self.running.values():
            stop(process)
        self.running.clear()

    def _fill(self) -> None:
        """Start jobs where there is place; those that cannot be started have ended."""
        while self.places and self.waiting:
            job = self.waiting.popleft().at(self.places[0], self.threads)
            try:
                self.running[job.name] = (job, start(job))
                self.places.popleft()
            except (UserError, OSError) as error:
                self.refused[job.name] = str(error)


def local(runs: int, workers: int | None, threads: int, device: str) -> Local:
    """Shares of this machine for `runs` runs. Without a number, one worker for each CUDA device, or up to four on the CPU.

    `device` is the runtime's: auto and cuda spread over all CUDA devices. Raises UserError on more workers than cores.
    """
    devices, most = devices_for(device), cores()
    if workers is None:
        workers = min(runs, most // max(threads, 1), len(devices) if devices[0].startswith("cuda") else MOST_WORKERS)
    workers = max(1, workers)
    if workers > most:
        raise UserError(f"workers must be at most the number of cores, {most}, not {workers}")
    if threads * workers > most:
        raise UserError(f"{workers} workers of {threads} threads are more than {most} cores; give fewer --workers or --threads")
    return Local(workers, threads or most // workers, devices)


def devices_for(device: str) -> list[str]:
    """The devices that a runtime's `device` stands for on this machine."""
    count = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if count > 1:
        return [f"cuda:{number}" for number in range(count)]
    return ["cuda" if count else "cpu"] if device == "auto" else [device]


def drive(placement: Placement, jobs: Sequence[Job], look: Callable[[], None]) -> dict[str, str]:
    """Run `jobs` to their ends; give those that failed, with their lines. `look` is called now and then."""
    failed: dict[str, str] = {}
    going = {job.name for job in jobs}
    placement.submit(jobs)
    while going:
        ended = placement.ended()
        failed |= {name: line for name, line in ended.items() if line is not None}
        going -= ended.keys()
        look()
        if going:
            time.sleep(POLL)
    return failed

"""Runs as processes on this machine."""

import subprocess
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from advmoe.data import cores
from advmoe.errors import UserError
from advmoe.sweep.job import Job, record_failure, start, stop
from advmoe.sweep.placements.base import Placement, Request
from advmoe.wording import number_of

MAX_WORKERS = 4  # on a CPU, by default


class LocalPlacement(Placement):
    """At most `workers` processes at once, which share the devices and threads.

    The default number of workers is one for each CUDA device, or up to four on the CPU. The devices auto and cuda mean all CUDA
    devices.
    """

    @classmethod
    def check(cls, request: Request) -> None:
        """Raises UserError for more workers or threads than the machine has cores."""
        workers, threads, limit = _workers(request), request.threads, cores()
        if workers > limit:
            raise UserError(f"workers must be at most the number of cores, {limit}, not {workers}")
        if threads * workers > limit:
            raise UserError(
                f"{workers} workers of {threads} threads are more than {limit} cores; give fewer --workers or --threads"
            )

    def __init__(self, request: Request) -> None:
        self.check(request)
        devices = devices_for(request.device)
        self.workers = _workers(request)
        self.threads = request.threads or cores() // self.workers
        self.free = deque(devices[worker % len(devices)] for worker in range(self.workers))
        self.waiting: deque[Job] = deque()
        self.refused: dict[str, str | None] = {}
        self.running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
        devices_used = ", ".join(dict.fromkeys(self.free))
        self.description = f"{number_of(self.workers, 'worker')} of {number_of(self.threads, 'thread')} on {devices_used}"

    def submit(self, jobs: Sequence[Job]) -> None:
        self.waiting.extend(jobs)
        self._fill()

    def ended(self) -> Mapping[str, str | None]:
        ended: dict[str, str | None] = {}
        for name, (job, process) in list(self.running.items()):
            status = process.poll()
            if status is not None:
                stop([process])
                ended[name] = record_failure(job, status)
                self.free.append(job.config.runtime.device)
                del self.running[name]
        self._fill()
        ended, self.refused = ended | self.refused, {}
        return ended

    def close(self) -> Mapping[str, str | None]:
        self.waiting.clear()
        ended = self.ended()
        stop([process for _, process in self.running.values()])
        self.running.clear()
        return ended

    def _fill(self) -> None:
        """Start jobs while a device is free. A job that cannot be started counts as failed."""
        while self.free and self.waiting:
            job = self.waiting.popleft().at(self.free[0], self.threads)
            try:
                self.running[job.name] = (job, start(job))
                self.free.popleft()
            except (UserError, OSError) as error:
                self.refused[job.name] = str(error)


def _workers(request: Request) -> int:
    if request.workers is not None:
        return max(1, request.workers)
    devices = devices_for(request.device)
    limit = len(devices) if devices[0].startswith("cuda") else MAX_WORKERS
    return max(1, min(request.runs, cores() // max(request.threads, 1), limit))


def devices_for(device: str) -> list[str]:
    """The devices of this machine that the setting `device` means."""
    count = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if count > 1:
        return [f"cuda:{number}" for number in range(count)]
    return ["cuda" if count else "cpu"] if device == "auto" else [device]

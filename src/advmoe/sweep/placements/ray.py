"""Runs as tasks of a Ray cluster: an existing one, or one that is started on this machine.

A task whose worker or process was killed is executed again, and the run continues from its last checkpoint.
"""

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from advmoe.data import cores
from advmoe.errors import UserError, reason_of
from advmoe.runs.failure import mark_failed
from advmoe.sweep.job import Job, execute
from advmoe.sweep.placements.base import Placement, Request
from advmoe.wording import number_of

try:
    import ray
except ImportError:
    raise UserError("placement ray needs the extra ray: pip install 'advmoe[ray]'") from None

RETRIES = 3  # after a killed worker


class Killed(Exception):
    """The job's process was killed; the message names the signal."""


class RayPlacement(Placement):
    """Each job requests `threads` CPUs and, if the cluster has GPUs and `device` is not the CPU, one GPU."""

    @classmethod
    def check(cls, request: Request) -> None:
        """Raises UserError for a number of workers or threads that is not possible."""
        if request.address is not None and request.workers is not None:
            raise UserError("--workers is only for Ray on this machine; on a cluster, --threads decides how many runs fit")
        if request.address is None and request.threads > cores():
            raise UserError(f"threads must be at most the number of cores, {cores()}, not {request.threads}")

    def __init__(self, request: Request) -> None:
        self.check(request)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address, self.device, self.threads = request.address, request.device, max(request.threads, 1)
        cpus = min(cores(), (request.workers or cores()) * self.threads)
        _check_reachable(address)
        size = {} if address else {"num_cpus": cpus, "include_dashboard": False}
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **size)
        except (ConnectionError, ValueError, RuntimeError, AssertionError, ray.exceptions.RayError) as error:
            raise UserError(f"no Ray cluster at {address or 'this machine'}: {reason_of(error)}") from None
        resources = ray.cluster_resources()
        _check_capacity(address, self.threads)
        gpus = 1 if resources.get("GPU") and self.device != "cpu" else 0
        self.workers = max(1, int(min(resources.get("CPU", 0) // self.threads, resources["GPU"] if gpus else float("inf"))))
        each = number_of(self.threads, "thread") + (" and a GPU each" if gpus else "")
        self.description = f"Ray, {number_of(self.workers, 'run')} at once of {each}"
        options = {"num_cpus": self.threads, "num_gpus": gpus, "max_retries": RETRIES, "retry_exceptions": [Killed]}
        self.task: Any = ray.remote(**options)(attend)
        self.jobs: dict[Any, Job] = {}

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            placed = job.at(self.device, self.threads)
            self.jobs[self.task.options(name=job.name).remote(placed)] = placed

    def ended(self) -> Mapping[str, str | None]:
        ready, _ = ray.wait(list(self.jobs), num_returns=len(self.jobs), timeout=0) if self.jobs else ([], [])
        return {job.name: _outcome(reference, job) for reference, job in ((one, self.jobs.pop(one)) for one in ready)}

    def close(self) -> Mapping[str, str | None]:
        ended = self.ended()
        jobs, self.jobs = self.jobs, {}
        for reference in jobs:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(reference, force=True)
        ray.shutdown()
        return ended


def _check_reachable(address: str | None) -> None:
    """Raises UserError if nothing answers at HOST:PORT. Ray would try for many minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster at {address}: {error}") from None


def _check_capacity(address: str | None, threads: int) -> None:
    """Disconnects and raises UserError if no node of the cluster has enough CPUs for a run. Ray would wait for ever."""
    largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if largest < threads:
        ray.shutdown()
        raise UserError(
            f"Ray cluster at {address or 'this machine'}: no node has the {threads} CPUs of a run (at most {largest:g})"
        )


def attend(job: Job) -> str | None:
    """Execute a job; return its error, or None. Raises Killed if its process was killed."""
    line, killed = execute(job)
    if killed:
        raise Killed(line)
    return line


def _outcome(reference: Any, job: Job) -> str | None:
    try:
        line: str | None = ray.get(reference)
        return line
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        line = f"{reason_of(cause)}, {RETRIES + 1} times"
        mark_failed(job.folder, line)
        return line

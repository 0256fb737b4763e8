"""Runs as jobs of a Slurm cluster, through submitit, whose executors local and debug need no Slurm."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from advmoe.errors import UserError, nearest, reason_of
from advmoe.runs.failure import mark_failed
from advmoe.sweep.job import Job, execute
from advmoe.sweep.placements.base import Placement, Request
from advmoe.wording import number_of

try:
    import submitit
    from submitit.helpers import Checkpointable
except ImportError:
    raise UserError("placement slurm needs the extra slurm: pip install 'advmoe[slurm]'") from None

DAY = 24 * 60  # minutes that a job may take by default; submitit's default is five
EXECUTORS = ["slurm", "local", "debug"]
# errors of submitit for wrong parameters and missing clusters
REFUSALS = (RuntimeError, NameError, TypeError, ValueError, AssertionError)


class Attendant(Checkpointable):  # type: ignore[misc]  # submitit gives no types
    """Executes a job; a job that Slurm preempts is queued again and continues from its last checkpoint."""

    def __call__(self, job: Job) -> str | None:
        """Return the job's error, or None."""
        return execute(job)[0]


class SlurmPlacement(Placement):
    """One Slurm job for each run. `parameters` are submitit's, as KEY=VALUE; `workers` is the most jobs that run at once.

    `address` is the name of submitit's executor, by default slurm.
    """

    @classmethod
    def check(cls, request: Request) -> None:
        """Raises UserError for an executor or a parameter that submitit does not know."""
        executor = request.address or "slurm"
        if executor not in EXECUTORS:
            raise UserError(f"--address: submitit has no executor '{executor}': {nearest(executor, EXECUTORS)}")
        parameters = parsed(request.parameters)
        try:
            submitit.AutoExecutor("submitit", cluster="debug").update_parameters(**parameters)  # knows all executors' names
        except REFUSALS as error:
            raise UserError(f"--slurm: submitit: {reason_of(error)}") from None

    def __init__(self, request: Request) -> None:
        self.check(request)
        executor, out, workers, parameters = request.address or "slurm", request.out, request.workers, request.parameters
        self.threads, self.device = max(request.threads, 1), request.device
        self.workers = workers or 1
        self.description = f"submitit's {executor} executor, {number_of(self.threads, 'thread')} a run"
        settings = {"timeout_min": DAY, "cpus_per_task": self.threads, **parsed(parameters)}
        if workers is not None:
            settings["slurm_array_parallelism"] = workers
        try:
            self.executor = submitit.AutoExecutor(out / "submitit", cluster=executor)
            self.executor.update_parameters(name="advmoe", **settings)
        except REFUSALS as error:
            raise UserError(f"submitit: {reason_of(error)}") from None
        self.jobs: list[tuple[Any, Job]] = []

    def submit(self, jobs: Sequence[Job]) -> None:
        placed = [job.at(self.device, self.threads) for job in jobs]
        self.jobs = list(zip(self.executor.map_array(Attendant(), placed), placed, strict=True))

    def ended(self) -> Mapping[str, str | None]:
        done = [(handle, job) for handle, job in self.jobs if handle.done()]
        self.jobs = [pair for pair in self.jobs if pair not in done]
        return {job.name: _outcome(handle, job) for handle, job in done}

    def close(self) -> Mapping[str, str | None]:
        ended = self.ended()
        jobs, self.jobs = self.jobs, []
        for handle, _ in jobs:
            handle.cancel(check=False)
        return ended


def parsed(parameters: Sequence[str]) -> dict[str, object]:
    """submitit's parameters by name: a value in JSON (4, 1.5, true, {"exclude": "n1"}) as such, any other (24:00:00) as text.
    Raises UserError for text that is not KEY=VALUE."""
    split = [parameter.partition("=") for parameter in parameters]
    for name, equals, value in split:
        if not (name and equals and value):
            raise UserError(f"--slurm: '{name}{equals}{value}' is not KEY=VALUE (for example slurm_partition=gpu)")
    return {name: _value(value) for name, _, value in split}


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _outcome(handle: Any, job: Job) -> str | None:
    try:
        line: str | None = handle.result()
        return line
    except Exception as error:  # submitit, Slurm or the machine may raise anything
        line = reason_of(error)
        mark_failed(job.folder, line)
        return line

"""What every placement offers: it takes jobs, and says how they ended."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from advmoe.sweep.job import Job


@dataclass(frozen=True)
class Request:
    """What a sweep asks of a placement: `runs` is the number of runs, `out` the sweep's folder, `workers` how many runs at once.

    `threads` are the CPU threads of a run, 0 for a default; `address` and `parameters` are the command line's --address and
    --slurm.
    """

    runs: int
    out: Path
    workers: int | None = None
    threads: int = 0
    device: str = "auto"
    address: str | None = None
    parameters: Sequence[str] = ()


class Placement(ABC):
    """Takes jobs and says how they ended. A run's folder must have the same path wherever its job runs.

    `description` is a phrase for the plan, `workers` how many jobs run at once, `threads` the CPU threads of each. Making one
    raises UserError if the request cannot be met.
    """

    description: str
    workers: int
    threads: int

    @classmethod
    @abstractmethod
    def check(cls, request: Request) -> None:
        """Raises UserError on a request that can never be met. Asks no cluster, and writes nothing."""

    @abstractmethod
    def __init__(self, request: Request) -> None: ...

    @abstractmethod
    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs to be run in this order."""

    @abstractmethod
    def ended(self) -> Mapping[str, str | None]:
        """The jobs that ended since the last call: name -> the error a job ended with, or None."""

    @abstractmethod
    def close(self) -> None:
        """End the jobs that run, and forget those that wait. What they have saved is kept."""

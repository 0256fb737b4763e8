"""The interface of placements, which execute the runs of a sweep."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from advmoe.sweep.job import Job


@dataclass(frozen=True)
class Request:
    """The settings of a placement. `runs` is the number of runs, `out` the sweep's folder, `workers` the number of runs at once.

    `threads` is the number of CPU threads of a run, 0 for the default; `address` and `parameters` are the values of --address and
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
    """Executes jobs. The path of a run's folder must be the same on all machines.

    `description` is printed with the plan, `workers` is the number of jobs that run at once, `threads` the CPU threads of each. The
    constructor raises UserError if the request cannot be met.
    """

    description: str
    workers: int
    threads: int

    @classmethod
    @abstractmethod
    def check(cls, request: Request) -> None:
        """Raises UserError for a request that can never be met. Connects to no cluster and writes nothing."""

    @abstractmethod
    def __init__(self, request: Request) -> None: ...

    @abstractmethod
    def submit(self, jobs: Sequence[Job]) -> None:
        """Execute jobs, in this order."""

    @abstractmethod
    def ended(self) -> Mapping[str, str | None]:
        """The jobs that ended since the last call: name -> error, or None if the job succeeded."""

    @abstractmethod
    def close(self) -> Mapping[str, str | None]:
        """Stop the running jobs and drop the waiting ones. Their files are kept. Returns the jobs that had ended before, as
        `ended`."""

"""Runs the jobs of a sweep until all have ended or the time is over."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from advmoe.parent import GRACE
from advmoe.sweep.job import Job
from advmoe.sweep.placements import Placement

POLL = 0.5  # seconds between two readings of the states
SHARE = 0.05  # of the time, reserved for starting and ending beside GRACE


@dataclass(frozen=True)
class SweepOutcome:
    """`failed` maps each job that failed to its error; `remaining` names the jobs that were stopped."""

    failed: dict[str, str] = field(default_factory=dict)
    remaining: tuple[str, ...] = ()


def deadline(started: float, minutes: float | None) -> float:
    """The time (of time.monotonic) at which jobs must be stopped, so that a command that began at `started` ends within
    `minutes`."""
    if minutes is None:
        return inf
    return started + 60 * minutes - GRACE - min(GRACE, SHARE * 60 * minutes)


def drive(placement: Placement, jobs: Sequence[Job], refresh: Callable[[], None], until: float = inf) -> SweepOutcome:
    """Run `jobs` until they end, or until the time `until` (of time.monotonic). `refresh` is called about twice a second.

    A job that is stopped keeps its finished epochs, its finished attacks, and, if its placement lets it end by itself, a checkpoint
    within the epoch.
    """
    failed: dict[str, str] = {}
    remaining = {job.name: job for job in jobs}
    if time.monotonic() < until:
        placement.submit(jobs)

    def collect(ended: Mapping[str, str | None]) -> None:
        failed.update({name: line for name, line in ended.items() if line is not None})
        for name in ended:
            del remaining[name]

    while remaining and time.monotonic() < until:
        collect(placement.ended())
        refresh()
        if remaining:
            time.sleep(min(POLL, max(0.0, until - time.monotonic())))
    if remaining:
        collect(placement.close())
    return SweepOutcome(failed, tuple(remaining))

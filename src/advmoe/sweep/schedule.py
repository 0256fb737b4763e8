"""Runs the jobs of a sweep, until all have ended or the time is up."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

from advmoe.sweep.job import GRACE, Job
from advmoe.sweep.placements import Placement

POLL = 0.5  # seconds between looks at the runs
SHARE = 0.05  # of a slice, that is kept for starting and ending


@dataclass(frozen=True)
class Outcome:
    """`failed` has the error of each job that failed, `remaining` the names of the jobs that were not done in time."""

    failed: dict[str, str] = field(default_factory=dict)
    remaining: tuple[str, ...] = ()


def deadline(started: float, minutes: float | None) -> float:
    """When jobs must be stopped (time.monotonic) so that a command that started then ends within `minutes`."""
    if minutes is None:
        return inf
    return started + 60 * minutes - min(2 * GRACE, SHARE * 60 * minutes)


def drive(placement: Placement, jobs: Sequence[Job], look: Callable[[], None], until: float = inf) -> Outcome:
    """Run `jobs` to their ends, or until the clock (time.monotonic) says `until`. `look` is called now and then.

    A job that is stopped keeps its finished epochs, a checkpoint within the epoch where its placement allows, and the finished
    attacks of its evaluation.
    """
    failed: dict[str, str] = {}
    remaining = {job.name: job for job in jobs}
    if time.monotonic() < until:
        placement.submit(jobs)
    while remaining and time.monotonic() < until:
        ended = placement.ended()
        failed |= {name: line for name, line in ended.items() if line is not None}
        for name in ended:
            del remaining[name]
        look()
        if remaining:
            time.sleep(min(POLL, max(0.0, until - time.monotonic())))
    if remaining:
        placement.close()
    return Outcome(failed, tuple(remaining))

"""Whether a pass makes the host wait for the device, and how often a training iteration does."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from advmoe.benchmark.rows import Row
from advmoe.benchmark.suites.cuda.common import Figure, Figures, Part, guarded
from advmoe.benchmark.suites.cuda.iterations import step
from advmoe.benchmark.suites.cuda.networks import passes
from advmoe.benchmark.timing import wait_for
from advmoe.benchmark.variants import Call


def waits(part: Part) -> Iterator[Row]:
    """Passes, of which the first wait raises; iterations, whose waits are counted."""
    for name in part.dispatches:
        for what, call in passes(part, "MoE", name, part.scale.batch).items():
            yield from guarded("waits", f"{what}, {name}", partial(alarmed, part, call))
    for name in part.dispatches:
        yield from guarded("waits", f"AdvMoE iteration, {name}", partial(counted, part, name))


def alarmed(part: Part, call: Call) -> Figures:
    """1 where the second call of a pass waits, 0 where it does not."""
    call()
    wait_for(part.device)
    try:
        with alarm(part, "error"):
            call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return {"host waits": Figure(1, "count")}
    return {"host waits": Figure(0 if part.cuda else None, "count")}


def counted(part: Part, dispatch: str) -> Figures:
    """The waits of an iteration."""
    call = step(part, "AdvMoE", dispatch)
    call()
    wait_for(part.device)
    with warnings.catch_warnings(record=True) as caught, alarm(part, "warn"):
        warnings.simplefilter("always")
        call()
    count = sum("synchroniz" in str(warning.message) for warning in caught)
    return {"host waits": Figure(count if part.cuda else None, "count")}


@contextmanager
def alarm(part: Part, mode: str) -> Iterator[None]:
    """torch's mode for waits of the host: "error" or "warn"."""
    if part.cuda:
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        if part.cuda:
            torch.cuda.set_sync_debug_mode("default")

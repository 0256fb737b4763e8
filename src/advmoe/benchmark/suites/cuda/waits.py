"""Whether the host waits for the device in a pass, and how often it waits in a training iteration."""

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
from advmoe.config.choices import Dispatch


def waits(part: Part) -> Iterator[Row]:
    """Whether passes wait (the first wait raises an error), and the number of waits in iterations."""
    for name in part.dispatches:
        for what, call in passes(part, "MoE", name, part.scale.batch).items():
            yield from guarded("waits", f"{what}, {name}", partial(whether_pass_waits, part, call))
    for name in part.dispatches:
        yield from guarded("waits", f"AdvMoE iteration, {name}", partial(waits_of_iteration, part, name))


def whether_pass_waits(part: Part, call: Call) -> Figures:
    """1 if the second call of a pass waits, else 0."""
    call()
    wait_for(part.device)
    try:
        with report_waits(part, "error"):
            call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return {"host waits": Figure(1, "count")}
    return {"host waits": Figure(0 if part.cuda else None, "count")}


def waits_of_iteration(part: Part, dispatch: Dispatch) -> Figures:
    """The number of waits in an iteration."""
    call = step(part, "AdvMoE", dispatch)
    call()
    wait_for(part.device)
    with warnings.catch_warnings(record=True) as caught, report_waits(part, "warn"):
        warnings.simplefilter("always")
        call()
    count = sum("synchroniz" in str(warning.message) for warning in caught)
    return {"host waits": Figure(count if part.cuda else None, "count")}


@contextmanager
def report_waits(part: Part, mode: str) -> Iterator[None]:
    """Inside the block, torch reports when the host waits: as an "error" or with "warn"."""
    if part.cuda:
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        if part.cuda:
            torch.cuda.set_sync_debug_mode("default")

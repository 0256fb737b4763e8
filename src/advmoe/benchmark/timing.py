"""Time of variants that take turns, so that what else the machine does meets all of them alike."""

import time
from collections.abc import Callable, Mapping

import torch

Calls = Mapping[str, Callable[[], object]]


def timed(calls: Calls, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call in each of `rounds` rounds, all calls once a round; a round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            passed = stopwatch(call, device)
            if number > 0:
                seconds[name].append(passed)
    return seconds


def stopwatch(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, until its results are there."""
    wait_for(device)
    started = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device: torch.device) -> None:
    """Let a CUDA device finish what it was given; the CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

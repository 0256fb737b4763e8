"""Time variants in turn, so that other load on the machine affects all of them equally."""

import time
from collections.abc import Callable, Mapping

import torch

Calls = Mapping[str, Callable[[], object]]


def timed(calls: Calls, rounds: int, device: torch.device, warm_up: int = 1) -> dict[str, list[float]]:
    """The seconds of each call in each of `rounds` rounds, after `warm_up` rounds. Every round runs all calls once."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            passed = stopwatch(call, device)
            if number >= warm_up:
                seconds[name].append(passed)
    return seconds


def stopwatch(call: Callable[[], object], device: torch.device) -> float:
    """The seconds of one call, until its results are ready on the device."""
    wait_for(device)
    started = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device: torch.device) -> None:
    """Wait until a CUDA device has finished its work. On the CPU this does nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

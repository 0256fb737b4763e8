"""Peak memory of training iterations, each configuration in a process of its own: no other run's memory is reused there."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from advmoe.benchmark.timing import stopwatch
from advmoe.benchmark.variants import iteration
from advmoe.config import RunConfig, from_dict, to_dict

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ITERATIONS = 2  # the optimizer's own memory is there from the second one on


@dataclass(frozen=True)
class Probe:
    """What iterations of a run took: bytes at their peak past what was held before the first, seconds of each after it."""

    memory: int
    seconds: float


def measurable(device: torch.device) -> bool:
    """Whether the peak can be read here: on Linux, and on CUDA."""
    return device.type == "cuda" or PEAK.exists()


def probe(config: RunConfig, side: int, device: torch.device, iterations: int = ITERATIONS) -> Probe:
    """Iterations of `config` on random images of `side`, measured in a fresh process."""
    task = {
        "config": to_dict(config), "side": side, "device": str(device), "iterations": iterations,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    command = [sys.executable, "-c", "from advmoe.benchmark.memory import main; main()"]
    said = subprocess.run(command, input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=True).stdout
    return Probe(**json.loads(said.splitlines()[-1]))


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that `call` holds at its peak past what is held before it. On the CPU those are the process's resident pages."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    PEAK.write_text("5")  # the peak starts anew from what is resident now
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def main() -> None:
    """What the fresh process does: read a task as JSON from stdin, print a Probe as JSON."""
    task = json.load(sys.stdin)
    device = torch.device(task["device"])
    torch.set_num_threads(task["threads"])
    step = iteration(from_dict(task["config"]), task["side"], device)
    seconds: list[float] = []
    held = peak(lambda: seconds.extend(stopwatch(step, device) for _ in range(task["iterations"])), device)
    print(json.dumps(asdict(Probe(held, median(seconds[1:])))))

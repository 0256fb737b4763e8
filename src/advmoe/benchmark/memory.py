"""Peak memory of training iterations. Each configuration runs in a new process, which cannot reuse memory of another run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from pydantic import BaseModel

from advmoe.benchmark.process import ProcessFailed, run_in_process
from advmoe.benchmark.timing import stopwatch
from advmoe.benchmark.variants import iteration
from advmoe.config import RunConfig, StoredConfig
from advmoe.errors import UserError

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ITERATIONS = 2  # the optimizer allocates its memory in the first one


class ProbeTask(BaseModel):
    """Iterations of a configuration on random images of height and width `side`."""

    config: StoredConfig
    side: int
    device: str
    iterations: int
    threads: int


class Probe(BaseModel):
    """`memory`: peak in bytes above the memory before the first iteration. `seconds`: median time of the later iterations."""

    memory: int
    seconds: float


def measurable(device: torch.device) -> bool:
    """Whether peak memory can be measured on `device`: on Linux, and on CUDA."""
    return device.type == "cuda" or PEAK.exists()


def probe(config: RunConfig, side: int, device: torch.device, iterations: int = ITERATIONS) -> Probe:
    """Measure iterations of `config` on random images of height and width `side` in a new process.

    Raises UserError if that process fails.
    """
    threads = torch.get_num_threads()
    task = ProbeTask(config=config, side=side, device=str(device), iterations=iterations, threads=threads)
    try:
        (result,) = run_in_process(run_probe, task, Probe)
    except ProcessFailed as error:
        batch = config.training.batch_size
        raise UserError(f"iterations of {config.method} at batch {batch} could not be measured: {error}") from None
    return result


def run_probe(task: ProbeTask) -> Iterator[Probe]:
    """Measure the iterations of `task` in this process."""
    device = torch.device(task.device)
    torch.set_num_threads(task.threads)
    step = iteration(task.config, task.side, device)
    seconds: list[float] = []
    memory = peak(lambda: seconds.extend(stopwatch(step, device) for _ in range(task.iterations)), device)
    yield Probe(memory=memory, seconds=median(seconds[1:]))


def peak(call: Callable[[], object], device: torch.device) -> int:
    """The peak memory of `call` in bytes, above the memory before it. On the CPU this is the resident memory of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    PEAK.write_text("5")  # sets the peak to the current resident memory
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])

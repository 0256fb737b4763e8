import mmap

import pytest
import torch

from advmoe.benchmark import memory
from advmoe.benchmark.memory import PEAK, measurable, peak, probe
from advmoe.benchmark.process import ProcessFailed
from advmoe.benchmark.setup import Scale
from advmoe.benchmark.variants import configuration
from advmoe.errors import UserError

CPU = torch.device("cpu")
MIB = 2**20
pytestmark = pytest.mark.skipif(not PEAK.exists(), reason="the peak of resident memory is read from Linux's /proc")


def allocate(size):
    """Write `size` MiB of pages that come from the system, whatever the allocator of this process keeps (advmoe.libraries)."""
    torch.frombuffer(mmap.mmap(-1, size * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8).fill_(1)


@pytest.mark.parametrize("size", [64, 256])
def test_peak_counts_memory_that_is_freed_again(size):
    assert peak(lambda: allocate(size), CPU) == pytest.approx(size * MIB, rel=0.1)


def test_peak_ignores_earlier_allocations():
    allocate(256)
    assert peak(lambda: allocate(64), CPU) == pytest.approx(64 * MIB, rel=0.1)


def test_probe_measures_iterations_in_a_separate_process():
    config = configuration("AT (Dense)", Scale(width=4, training_batch=8))
    small = probe(config, 16, CPU)
    large = probe(config.replace(training=config.training.replace(batch_size=128)), 16, CPU)
    assert 0 < small.memory < large.memory
    assert small.seconds > 0
    assert large.seconds > 0


def test_a_probe_times_the_iterations_after_the_first(monkeypatch):
    durations = iter([100.0, 4.0, 2.0, 3.0])
    monkeypatch.setattr(memory, "stopwatch", lambda step, device: (step(), next(durations))[1])
    config = configuration("AT (Dense)", Scale(width=4, training_batch=8))
    (result,) = memory.run_probe(memory.ProbeTask(config=config, side=16, device="cpu", iterations=4, threads=1))
    assert result.seconds == 3.0
    assert result.memory > 0


def test_a_process_that_fails_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(memory, "run_in_process", lambda *args: (_ for _ in ()).throw(ProcessFailed("status -9")))
    with pytest.raises(UserError, match="iterations of at_dense at batch 8 could not be measured: status -9"):
        probe(configuration("AT (Dense)", Scale(width=4, training_batch=8)), 16, CPU)


def test_cuda_reads_its_allocator(monkeypatch):
    figures = {"reset_peak_memory_stats": None, "memory_allocated": 30, "max_memory_allocated": 100}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert peak(lambda: None, torch.device("cuda", 0)) == 70
    assert measurable(torch.device("cuda", 0))

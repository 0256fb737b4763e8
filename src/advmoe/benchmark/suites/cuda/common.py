"""What the sections of the CUDA suite share: where they run, and rows that keep failures."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import torch
from pydantic import BaseModel

from advmoe.benchmark.rows import Row
from advmoe.benchmark.setup import QUICK, Scale
from advmoe.benchmark.timing import stopwatch
from advmoe.benchmark.variants import Call
from advmoe.moe import DISPATCHES
from advmoe.moe.dispatch import available


class Figure(NamedTuple):
    """A measured number and its unit."""

    value: float | None
    unit: str


Figures = dict[str, Figure]


class SectionTask(BaseModel):
    """A section for a fresh process."""

    section: str
    device: str
    quick: bool
    threads: int
    without: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """Where a section runs, and how large."""

    device: torch.device
    quick: bool
    without: tuple[str, ...] = ()

    @classmethod
    def of(cls, task: SectionTask) -> "Part":
        """The part that a task describes."""
        return cls(torch.device(task.device), task.quick, task.without)

    @property
    def cuda(self) -> bool:
        """Whether this is a CUDA device."""
        return self.device.type == "cuda"

    @property
    def scale(self) -> Scale:
        """The recipe's batch of 128, or tiny."""
        return replace(QUICK, width=8, training_batch=4) if self.quick else Scale(batch=128)

    @property
    def rounds(self) -> int:
        """Rounds of a comparison."""
        return 1 if self.quick else 10

    @property
    def dispatches(self) -> list[str]:
        """Those that run here except `without`; the Triton kernels last, as a fault in them ends the process."""
        return [name for name in available(self.device) if name in DISPATCHES and name not in self.without]

    def bf16(self) -> torch.autocast:
        """bf16 on CUDA. Casts are not cached: a CUDA graph would keep them."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda, cache_enabled=False)


def guarded(section: str, name: str, measure: Callable[[], Figures]) -> Iterator[Row]:
    """A row for each figure, or one that says why there is none."""
    try:
        figures = measure()
    except Exception as error:  # whatever it is, the rest is still measured
        yield failure(f"{section}, {name}", "measured", error)
        return
    for what, figure in figures.items():
        yield Row(suite="cuda", case=f"{section}, {name}", what=what, value=figure.value, unit=figure.unit)


def failure(case: str, what: str, error: Exception) -> Row:
    """The row of what failed, with the first line of the reason."""
    reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
    return Row(suite="cuda", case=case, what=what, value=None, failed=reason)


def title(kind: str, dispatch: str | None) -> str:
    """A kind of network or method, with its dispatch."""
    return kind if dispatch is None else f"{kind} {dispatch}"


def milliseconds(part: Part, call: Call) -> Figure:
    """Median over rounds of several calls in a row, after some that warm up."""
    many = 1 if part.quick else 10

    def repeated() -> None:
        for _ in range(many):
            call()

    stopwatch(repeated, part.device)
    return Figure(1000 * median(stopwatch(repeated, part.device) for _ in range(part.rounds)) / many, "ms")


def graphed(call: Call) -> Call:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay

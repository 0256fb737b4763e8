"""Code that the sections of the CUDA suite share: their setup, and rows for failures."""

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
from advmoe.config.choices import Dispatch
from advmoe.errors import reason_of
from advmoe.moe import DISPATCHES
from advmoe.moe.dispatch import available


class Figure(NamedTuple):
    """A measured number and its unit."""

    value: float | None
    unit: str


Figures = dict[str, Figure]


class SectionTask(BaseModel):
    """A section that runs in a new process."""

    section: str
    device: str
    quick: bool
    rounds: int | None
    threads: int
    without: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """The setup of a section: device and sizes."""

    device: torch.device
    quick: bool
    without: tuple[str, ...] = ()
    chosen_rounds: int | None = None

    @classmethod
    def of(cls, task: SectionTask) -> "Part":
        """The part that a task describes."""
        return cls(torch.device(task.device), task.quick, task.without, task.rounds)

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA device."""
        return self.device.type == "cuda"

    @property
    def scale(self) -> Scale:
        """Batches of 128 images as in the recipes, or tiny ones."""
        return replace(QUICK, width=8, training_batch=4) if self.quick else Scale(batch=128)

    def rounds(self, usual: int) -> int:
        """The number of rounds of a comparison whose default is `usual`."""
        return 1 if self.quick else self.chosen_rounds or usual

    @property
    def dispatches(self) -> list[Dispatch]:
        """The dispatches that run on the device, except `without`. Triton is last: an error in a kernel ends the process."""
        return [name for name in available(self.device) if name in DISPATCHES and name not in self.without]

    def bf16(self) -> torch.autocast:
        """bfloat16 autocast on CUDA. Casts are not cached, because a CUDA graph would keep them."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda, cache_enabled=False)


def guarded(section: str, name: str, measure: Callable[[], Figures]) -> Iterator[Row]:
    """A row for each figure, or one row with the reason why there is none."""
    try:
        figures = measure()
    except Exception as error:  # after any error, the remaining variants are still measured
        yield failure(f"{section}, {name}", "measured", error)
        return
    for what, figure in figures.items():
        yield Row(suite="cuda", case=f"{section}, {name}", what=what, value=figure.value, unit=figure.unit)


def failure(case: str, what: str, error: Exception) -> Row:
    """The row of a failed measurement, with the error."""
    return Row(suite="cuda", case=case, what=what, value=None, failed=reason_of(error, named=True))


def title(kind: str, dispatch: str | None) -> str:
    """The name of a kind of network or of a method, with its dispatch."""
    return kind if dispatch is None else f"{kind} {dispatch}"


def milliseconds(part: Part, call: Call) -> Figure:
    """Time of a call: the median over rounds of several calls in a row, after a warm-up."""
    many = 1 if part.quick else 10

    def repeated() -> None:
        for _ in range(many):
            call()

    stopwatch(repeated, part.device)
    return Figure(1000 * median(stopwatch(repeated, part.device) for _ in range(part.rounds(10))) / many, "ms")


def graphed(call: Call) -> Call:
    """The call, recorded as a CUDA graph."""
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

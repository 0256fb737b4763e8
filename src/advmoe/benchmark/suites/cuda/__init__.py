"""Do all dispatches run on CUDA as they should, and how fast? Under 8 minutes.

equality   every dispatch against a loop over images, values and gradients
waits      whether a pass makes the host wait for the device, and how often an iteration does
iterations AdvMoE's iteration with every dispatch beside AT (Dense)'s and AT (S-Dense)'s; minutes of 100 epochs
inference  whole networks, and the pass of an attack step; each also as a CUDA graph
layers     the MoE layers of ResNet-18 one by one
compiled   whole networks through torch.compile(mode="reduce-overhead")

Every section runs in a process of its own, so that one that crashes or hangs takes no other along; a failure is a row. A dispatch
that equality finds wrong is not timed. Convolutions are bf16 by autocast, routers float32, memory channels last, batches of 128.
On the CPU (--device cpu --quick) the suite shows only that it runs.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from advmoe.benchmark.process import ProcessFailed, separately
from advmoe.benchmark.rows import Row
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.suites.cuda.common import Part, SectionTask, failure
from advmoe.benchmark.suites.cuda.equality import equality
from advmoe.benchmark.suites.cuda.iterations import HUNDRED_EPOCHS, iterations
from advmoe.benchmark.suites.cuda.layers import layers
from advmoe.benchmark.suites.cuda.networks import compiled, inference
from advmoe.benchmark.suites.cuda.waits import waits
from advmoe.errors import UserError

SECONDS = 460  # of the whole suite
FULL_RUN = "<= 10"  # minutes for 100 epochs
SECTIONS: dict[str, Callable[[Part], Iterator[Row]]] = {
    "equality": equality, "waits": waits, "iterations": iterations, "inference": inference, "layers": layers, "compiled": compiled,
}  # fmt: skip


def check(setup: Setup) -> None:
    """Raises UserError without a CUDA device, unless the suite is to show on the CPU that it runs."""
    if setup.device.type != "cuda" and not setup.quick:
        raise UserError("suite cuda: there is no CUDA device here; --quick shows on the CPU that the suite runs")


def measure(setup: Setup) -> Iterator[Row]:
    """The rows of all sections, then the verdict."""
    ends = time.monotonic() + SECONDS
    wrong: list[str] = []
    rows: list[Row] = []
    for name in SECTIONS:
        task = SectionTask(
            section=name, device=str(setup.device), quick=setup.quick, threads=torch.get_num_threads(), without=tuple(wrong)
        )
        section: list[Row] = []
        try:
            for row in separately(run_section, task, Row, max(1.0, ends - time.monotonic())):
                section.append(row)
                yield row
        except ProcessFailed as error:
            section.append(failure(name, "section", error))
            yield section[-1]
        if name == "equality":
            wrong = unsound(section, Part.of(task).dispatches)
        rows += section
    yield from verdict(rows, wrong)


def run_section(task: SectionTask) -> Iterator[Row]:
    """What the process of a section does."""
    torch.set_num_threads(task.threads)
    yield from SECTIONS[task.section](Part.of(task))


def unsound(rows: Sequence[Row], dispatches: Sequence[str]) -> list[str]:
    """The dispatches that equality did not find right: with a failed row, or without one."""
    checked = {name: [row for row in rows if row.case.startswith(f"equality, {name},")] for name in dispatches}
    return [name for name, found in checked.items() if not found or any(row.failed for row in found)]


def verdict(rows: Sequence[Row], wrong: Sequence[str]) -> Iterator[Row]:
    """How many rows failed, which dispatches are wrong, and how long a full run takes with the fastest one."""
    failed = sum(row.failed is not None for row in rows)
    yield Row(suite="cuda", case="verdict", what="failed rows", value=failed, unit="count", target="<= 0")
    what = "wrong dispatches" + (f" ({', '.join(wrong)})" if wrong else "")
    yield Row(suite="cuda", case="verdict", what=what, value=len(wrong), unit="count", target="<= 0")
    minutes = {row.case: row.value for row in rows if row.what == HUNDRED_EPOCHS and row.value is not None and "AdvMoE" in row.case}
    if minutes:
        fastest = min(minutes, key=minutes.__getitem__)
        what = f"{HUNDRED_EPOCHS}, {fastest.removeprefix('iterations, ')}"
        yield Row(suite="cuda", case="verdict", what=what, value=minutes[fastest], unit="min", target=FULL_RUN)

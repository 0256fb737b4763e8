"""Are all dispatches correct on CUDA, and how fast are they? Under 8 minutes.

equality   every dispatch compared with a loop over images: values and gradients
waits      whether the host waits for the device in a pass, and how often in an iteration
iterations an iteration of AdvMoE with every dispatch (also with --compile graphs), of AT (Dense) and of AT (S-Dense); minutes for
           100 epochs
inference  full networks, and the pass of an attack step; each also as a CUDA graph
layers     the MoE layers of ResNet-18 one by one
compiled   full networks with torch.compile(mode="reduce-overhead")

Every section runs in a separate process, so that a crash or a hang affects no other section; a failure is a row. A dispatch that
fails the section equality is not timed. Convolutions are bfloat16 by autocast, routers float32, memory is channels last, and
batches have 128 images. On the CPU (--device cpu --quick) the suite only shows that it runs.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from advmoe.benchmark.process import ProcessFailed, run_in_process
from advmoe.benchmark.rows import Row
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.suites.cuda.common import Part, SectionTask, failure
from advmoe.benchmark.suites.cuda.equality import cases, equality
from advmoe.benchmark.suites.cuda.iterations import HUNDRED_EPOCHS, iterations
from advmoe.benchmark.suites.cuda.layers import layers
from advmoe.benchmark.suites.cuda.networks import compiled, inference
from advmoe.benchmark.suites.cuda.waits import waits
from advmoe.errors import UserError

SECONDS = 460  # limit for all sections together
FULL_RUN = "<= 10"  # minutes for 100 epochs
SECTIONS: dict[str, Callable[[Part], Iterator[Row]]] = {
    "equality": equality, "waits": waits, "iterations": iterations, "inference": inference, "layers": layers, "compiled": compiled,
}  # fmt: skip


def check(setup: Setup) -> None:
    """Raises UserError if there is no CUDA device, except for a quick run on the CPU."""
    if setup.device.type != "cuda" and not setup.quick:
        raise UserError("suite cuda: there is no CUDA device here; --quick shows on the CPU that the suite runs")


def measure(setup: Setup) -> Iterator[Row]:
    """The rows of all sections, then the verdict."""
    ends = time.monotonic() + SECONDS
    wrong: list[str] = []
    rows: list[Row] = []
    for name in SECTIONS:
        task = SectionTask(
            section=name, device=str(setup.device), quick=setup.quick, rounds=setup.scale.rounds,
            threads=torch.get_num_threads(), without=tuple(wrong),
        )  # fmt: skip
        section: list[Row] = []
        try:
            for row in run_in_process(run_section, task, Row, max(1.0, ends - time.monotonic())):
                section.append(row)
                yield row
        except ProcessFailed as error:
            section.append(failure(name, "section", error))
            yield section[-1]
        if name == "equality":
            wrong = unsound(section, Part.of(task))
        rows += section
    yield from verdict(rows, wrong)


def run_section(task: SectionTask) -> Iterator[Row]:
    """The code that runs in the process of a section."""
    torch.set_num_threads(task.threads)
    yield from SECTIONS[task.section](Part.of(task))


def unsound(rows: Sequence[Row], part: Part) -> list[str]:
    """The dispatches with a failed or a missing row in the section equality, in any data type."""
    passed = {row.case for row in rows} - {row.case for row in rows if row.failed}
    return [name for name in part.dispatches if not passed.issuperset(f"equality, {case}" for case in cases(part, name))]


def verdict(rows: Sequence[Row], wrong: Sequence[str]) -> Iterator[Row]:
    """The number of failed rows, the wrong dispatches, and the time of a full run with the fastest dispatch."""
    failed = sum(row.failed is not None for row in rows)
    yield Row(suite="cuda", case="verdict", what="failed rows", value=failed, unit="count", target="<= 0")
    what = "wrong dispatches" + (f" ({', '.join(wrong)})" if wrong else "")
    yield Row(suite="cuda", case="verdict", what=what, value=len(wrong), unit="count", target="<= 0")
    minutes = {row.case: row.value for row in rows if row.what == HUNDRED_EPOCHS and row.value is not None and "AdvMoE" in row.case}
    if minutes:
        fastest = min(minutes, key=minutes.__getitem__)
        what = f"{HUNDRED_EPOCHS}, {fastest.removeprefix('iterations, ')}"
        yield Row(suite="cuda", case="verdict", what=what, value=minutes[fastest], unit="min", target=FULL_RUN)

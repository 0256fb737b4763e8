"""All suites. Each is one module, and its first line says what is measured and how long it takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from advmoe.benchmark.rows import Row
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.suites import (
    attack,
    cuda,
    data,
    dispatch,
    export,
    growth,
    independent,
    inference,
    iteration,
    low_precision,
    memory,
    operators,
    precision,
    rerouting,
    scaling,
    streaming,
    training,
    waiting,
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """`measure` yields rows as they are measured. `check` raises UserError if something that the suite needs is missing. A suite
    with `on_cpu` measures on no other device."""

    measure: Callable[[Setup], Iterator[Row]]
    check: Callable[[Setup], None] = lambda _: None
    on_cpu: bool = False


SUITES = {
    "inference": Suite(inference.measure),
    "training": Suite(training.measure),
    "memory": Suite(memory.measure),
    "attack": Suite(attack.measure),
    "data": Suite(data.measure),
    "growth": Suite(growth.measure),
    "operators": Suite(operators.measure),
    "iteration": Suite(iteration.measure),
    "dispatch": Suite(dispatch.measure, on_cpu=True),
    "precision": Suite(precision.measure),
    "export": Suite(export.measure, export.check, on_cpu=True),
    "low_precision": Suite(low_precision.measure, low_precision.check, on_cpu=True),
    "scaling": Suite(scaling.measure),
    "streaming": Suite(streaming.measure, on_cpu=True),
    "rerouting": Suite(rerouting.measure, on_cpu=True),
    "independent": Suite(independent.measure, independent.check, on_cpu=True),
    "waiting": Suite(waiting.measure),
    "cuda": Suite(cuda.measure, cuda.check),
}
USUAL = ("inference", "training", "memory", "attack", "data", "growth")  # the suites that run by default

"""The row type of all suites (a number, its spread, and its target if it has one), and the file that contains the rows."""

import operator
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from pydantic import BaseModel, ConfigDict, computed_field

from advmoe.benchmark.machine import Machine
from advmoe.errors import UserError
from advmoe.files import write_atomically

COMPARE: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}
Ratio = tuple[str, str, str | None]  # numerator, denominator, target such as ">= 3.0"


class Row(BaseModel):
    """One measured number, or the reason why there is none.

    `case` is the same in all rows of a comparison ("ResNet-18, batch 64"), `what` is the variant or the ratio ("dense / MoE").
    `unit` is "ratio", "exponent", "s", "ms", "min", "bytes", "images/s", "GMACs", "%", "loss" or "count". `spread` is the smallest
    and the largest value of a single round. `target` is a limit such as ">= 3.0".
    """

    model_config = ConfigDict(frozen=True)

    suite: str
    case: str
    what: str
    value: float | None
    unit: str = "ratio"
    spread: tuple[float, float] | None = None
    target: str | None = None
    failed: str | None = None

    @property
    def name(self) -> str:
        """Case and variant."""
        return f"{self.case}: {self.what}"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def met(self) -> bool | None:
        """Whether the value meets its target; None without a target."""
        if self.target is None or self.value is None:
            return None
        sign, _, limit = self.target.partition(" ")
        return COMPARE[sign](self.value, float(limit))

    def __str__(self) -> str:
        if self.failed is not None:
            return f"{self.name:<72} failed: {self.failed}"
        spread = "" if self.spread is None else f" ({' to '.join(number(end, self.unit) for end in self.spread)})"
        target = "" if self.target is None else f", target {self.target}: {'met' if self.met else 'missed'}"
        return f"{self.name:<72} {number(self.value, self.unit):>8}{unit_label(self.unit)}{spread}{target}"


def number(value: float | None, unit: str) -> str:
    """A value without its unit: seconds as milliseconds, bytes as MB."""
    if value is None:
        return "not measured"
    if unit in ("ratio", "exponent"):
        return f"{value:.2f}"
    return f"{value * {'s': 1000, 'bytes': 1e-6}.get(unit, 1):.4g}"


def unit_label(unit: str) -> str:
    """The unit as it is printed after a number."""
    return {"ratio": "", "exponent": "", "count": "", "loss": "", "s": " ms", "bytes": " MB"}.get(unit, f" {unit}")


def compare(suite: str, case: str, unit: str, rounds: Mapping[str, Sequence[float]], ratios: Iterable[Ratio]) -> Iterator[Row]:
    """The median of each variant over its rounds, then the ratios.

    A ratio is the ratio of the medians. Its spread is that of the ratios of single rounds, in which the variants ran in turn.
    """
    for what, values in rounds.items():
        yield Row(suite=suite, case=case, what=what, value=median(values), unit=unit, spread=(min(values), max(values)))
    for above, below, target in ratios:
        single = [a / b for a, b in zip(rounds[above], rounds[below], strict=True)]
        value = median(rounds[above]) / median(rounds[below])
        spread = (min(single), max(single))
        yield Row(suite=suite, case=case, what=f"{above} / {below}", value=value, spread=spread, target=target)


class Report(BaseModel):
    """The result of one call of `advmoe benchmark`: the machine and all rows."""

    machine: Machine
    command: str
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Report":
        """The report of rows measured in this process."""
        command = shlex.join(["advmoe", *sys.argv[1:]])  # argv[0] may be __main__.py
        return cls(machine=Machine.of_this_process(), command=command, rows=tuple(rows))

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Read a report from a file. Raises OSError if it cannot be read, UserError if it holds no report."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not a file of advmoe benchmark --json ({str(error).splitlines()[0]})") from None

    def write(self, path: Path) -> None:
        """Write the report as JSON. An existing file is replaced only when the new one is complete."""
        write_atomically(path, self.model_dump_json(indent=1) + "\n")

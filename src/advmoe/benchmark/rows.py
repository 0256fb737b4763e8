"""What a benchmark says: ratios of medians beside their targets, and the file that keeps them."""

import operator
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from advmoe.evaluation.record import provenance
from advmoe.files import write_json

WITHIN: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}
Unit = Literal["seconds", "images_per_second", "bytes"]
Measured = Mapping[str, Sequence[float]]  # of each variant, one value a round
Ratio = tuple[str, str, str | None]  # variant above, variant below, target such as ">= 3.0"


@dataclass(frozen=True)
class Row:
    """One ratio, or one exponent of growth. `spread` is its least and greatest value; `met` is None without a target."""

    name: str
    ratio: float
    target: str | None
    met: bool | None
    spread: tuple[float, float]
    suite: str

    def __str__(self) -> str:
        target = f", target {self.target}: {'met' if self.met else 'missed'}" if self.target else ""
        return f"{self.name:<62} {self.ratio:6.2f} ({self.spread[0]:.2f} to {self.spread[1]:.2f}){target}"


@dataclass(frozen=True)
class Found:
    """What one comparison measured, in its unit, and the rows that follow from it."""

    title: str
    unit: Unit
    measured: Measured
    rows: tuple[Row, ...]


def compared(suite: str, title: str, unit: Unit, measured: Measured, ratios: Iterable[Ratio]) -> Found:
    """The ratios of what was measured, as rows."""
    return Found(title, unit, measured, tuple(_row(suite, title, ratio, measured) for ratio in ratios))


def _row(suite: str, title: str, ratio: Ratio, measured: Measured) -> Row:
    """The ratio of the medians; its spread is that of the single rounds, in which both variants ran one after the other."""
    name, below, target = ratio
    rounds = [a / b for a, b in zip(measured[name], measured[below], strict=True)]
    middle = median(measured[name]) / median(measured[below])
    return Row(f"{title}: {name} / {below}", middle, target, met(middle, target), (min(rounds), max(rounds)), suite)


def met(value: float, target: str | None) -> bool | None:
    """Whether `value` is as a target such as ">= 3.0" says; None where there is no target."""
    if target is None:
        return None
    sign, _, limit = target.partition(" ")
    return WITHIN[sign](value, float(limit))


def write_found(path: Path, found: Sequence[Found]) -> None:
    """All rows as JSON, with the medians behind them under their units, hardware and versions. The old file stays until then."""
    medians: dict[str, dict[str, dict[str, float]]] = {}
    for one in found:
        medians.setdefault(one.unit, {})[one.title] = {name: median(values) for name, values in one.measured.items()}
    rows = [asdict(row) for one in found for row in one.rows]
    write_json(path, {"machine": machine(), "command": _command(), "rows": rows, **medians}, indent=1)


def machine() -> dict[str, Any]:
    """What the figures depend on; memory in bytes."""
    made = provenance()
    return {
        **made["hardware"], "memory": _memory(), "platform": platform.platform(), "advmoe": made["advmoe"],
        "commit": made["commit"], "torch": made["versions"]["torch"], "python": made["versions"]["python"],
    }  # fmt: skip


def _memory() -> int | None:
    known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])

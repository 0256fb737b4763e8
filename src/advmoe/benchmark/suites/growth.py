"""Time and memory of an AdvMoE iteration by the settings of a run, with fitted exponents: cost ~ value ** exponent. 15 minutes.

One setting is varied at a time. The others are a batch of 32 images of 32 x 32, N = 2, r = 0.5 and 2 attack steps. Experts share no
filters, so the number of filters grows with N.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from advmoe.benchmark.memory import measurable, probe
from advmoe.benchmark.rows import Row
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.variants import configuration
from advmoe.config import RunConfig
from advmoe.files import drafted
from advmoe.reports.styles import COLOURS

BATCH = 32
ROUNDS = 3
QUANTITIES = {"s": "time", "bytes": "memory"}
UNITS = {"s": "seconds", "bytes": "bytes"}
Curve = Mapping[float, float]  # value -> cost


@dataclass(frozen=True)
class Task:
    """A run, and the height and width of its images."""

    run: RunConfig
    side: int

    def batch(self, size: float) -> "Task":
        """The same with batches of `size` images."""
        return replace(self, run=self.run.replace(training=self.run.training.replace(batch_size=int(size))))

    def experts(self, count: float) -> "Task":
        """The same with `count` experts, which share no filters."""
        return replace(self, run=self.run.replace(model=self.run.model.replace(num_experts=int(count), bank="disjoint")))

    def model_scale(self, share: float) -> "Task":
        """The same with experts that have the fraction `share` of the dense layer's filters."""
        return replace(self, run=self.run.replace(model=self.run.model.replace(model_scale=share)))

    def images(self, side: float) -> "Task":
        """The same with images of height and width `side`."""
        return replace(self, side=int(side))

    def attack_steps(self, count: float) -> "Task":
        """The same with attacks of `count` steps."""
        return replace(self, run=self.run.replace(attack=self.run.attack.replace(num_steps=int(count))))


AXES: dict[str, tuple[Callable[[Task, float], Task], tuple[float, ...]]] = {
    "batch": (Task.batch, (8, 16, 32, 64, 128, 256, 512)),
    "experts N": (Task.experts, (2, 4, 8, 16, 32, 64)),
    "model scale r": (Task.model_scale, (0.25, 0.5, 0.75, 1.0)),
    "image side": (Task.images, (16, 32, 48, 64)),
    "attack steps": (Task.attack_steps, (1, 2, 5, 10)),
}


def measure(setup: Setup) -> Iterator[Row]:
    """The time of an iteration along each axis, and its peak memory if it can be measured."""
    base = Task(configuration("AdvMoE", setup.scale), setup.scale.side).batch(BATCH).experts(2)
    for axis, (change, values) in AXES.items():
        tasks = {value: change(base, value) for value in (values[:2] if setup.quick else values)}
        iterations = 1 + setup.rounds(ROUNDS)  # the first one is not timed
        probes = {value: probe(task.run, task.side, setup.device, iterations) for value, task in tasks.items()}
        yield from fitted(axis, "s", {value: each.seconds for value, each in probes.items()})
        if measurable(setup.device):
            yield from fitted(axis, "bytes", {value: each.memory for value, each in probes.items()})


def fitted(axis: str, unit: str, curve: Curve) -> Iterator[Row]:
    """The points of a curve, and its exponent. The spread is that of the exponents between neighbouring points."""
    case = f"iteration's {QUANTITIES[unit]} against {axis}"
    points = sorted(curve.items())
    for value, cost in points:
        yield Row(suite="growth", case=case, what=f"{value:g}", value=cost, unit=unit)
    between = [exponent(dict(pair)) for pair in pairwise(points)]
    spread = (min(between), max(between))
    yield Row(suite="growth", case=case, what="exponent", value=exponent(curve), unit="exponent", spread=spread)


def exponent(curve: Curve) -> float:
    """The slope of the least-squares line through the logarithms of the points."""
    return float(np.polyfit(np.log(list(curve.keys())), np.log(list(curve.values())), 1)[0])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw one panel for each curve in the rows of this suite, with logarithmic axes and the fitted line."""
    curves = {unit: _curves(rows, unit) for unit in QUANTITIES}
    lines = [(unit, curve) for unit, curve in curves.items() if curve]
    columns = max(len(curve) for _, curve in lines)
    figure = Figure(figsize=(3 * columns, 2.8 * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False)
    for axes, (unit, by_case) in zip(grid, lines, strict=True):
        for ax, (case, curve) in zip(axes, by_case.items(), strict=False):
            _panel(ax, case.rpartition(" against ")[2], UNITS[unit], curve)
    with drafted(path) as draft:
        figure.savefig(draft, format="png", dpi=150)


def _curves(rows: Sequence[Row], unit: str) -> dict[str, dict[float, float]]:
    curves: dict[str, dict[float, float]] = {}
    for row in rows:
        if row.suite == "growth" and row.unit == unit and row.value is not None:
            curves.setdefault(row.case, {})[float(row.what)] = row.value
    return curves


def _panel(ax: Axes, axis: str, unit: str, curve: Curve) -> None:
    values, costs = np.array(list(curve)), np.array(list(curve.values()))
    slope, level = np.polyfit(np.log(values), np.log(costs), 1)
    ax.loglog(values, costs, "o", color=COLOURS[0])
    ax.loglog(values, np.exp(level) * values**slope, "--", color=COLOURS[1], label=f"exponent {slope:.2f}")
    ax.set(xlabel=axis, ylabel=unit)
    ax.set_xticks(values, labels=[f"{value:g}" for value in values])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)

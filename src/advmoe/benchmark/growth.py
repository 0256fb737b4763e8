"""Time and memory of an AdvMoE iteration against what a run chooses, with fitted exponents: cost ~ value ** exponent.

One value is varied at a time, around a batch of 32 images of 32 x 32, N = 2, r = 0.5 and 2 attack steps. Experts have filters of
their own, which therefore grow with N.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from advmoe.benchmark.memory import measurable, probe
from advmoe.benchmark.rows import Found, Row, Unit
from advmoe.benchmark.variants import Scale, configuration
from advmoe.config import RunConfig
from advmoe.files import drafted
from advmoe.reports.figures import COLOURS, DASHES

BATCH = 32
ROUNDS = 3
Curve = Mapping[float, float]  # value -> cost


@dataclass(frozen=True)
class Task:
    """A run, and the side of the images that it meets."""

    run: RunConfig
    side: int

    def batch(self, size: float) -> "Task":
        """With batches of `size`."""
        return replace(self, run=replace(self.run, training=replace(self.run.training, batch_size=int(size))))

    def experts(self, count: float) -> "Task":
        """With `count` experts, of filters of their own."""
        return replace(self, run=replace(self.run, model=replace(self.run.model, num_experts=int(count), bank="disjoint")))

    def model_scale(self, share: float) -> "Task":
        """With experts of `share` of the filters."""
        return replace(self, run=replace(self.run, model=replace(self.run.model, model_scale=share)))

    def images(self, side: float) -> "Task":
        """With images of `side`."""
        return replace(self, side=int(side))

    def attack_steps(self, count: float) -> "Task":
        """With attacks of `count` steps."""
        return replace(self, run=replace(self.run, attack=replace(self.run.attack, num_steps=int(count))))


AXES: dict[str, tuple[Callable[[Task, float], Task], tuple[float, ...]]] = {
    "batch": (Task.batch, (8, 16, 32, 64, 128)),
    "experts N": (Task.experts, (2, 4, 8, 16)),
    "model scale r": (Task.model_scale, (0.25, 0.5, 0.75, 1.0)),
    "image side": (Task.images, (16, 32, 48, 64)),
    "attack steps": (Task.attack_steps, (1, 2, 5, 10)),
}


def growth(scale: Scale, device: torch.device) -> Iterator[Found]:
    """Time of an iteration and, where it can be read, its peak memory along each axis, as they are measured."""
    base = Task(configuration("AdvMoE", scale), scale.side).batch(BATCH).experts(2)
    for name, (changed, values) in AXES.items():
        tasks = {value: changed(base, value) for value in values}
        iterations = 1 + (scale.rounds or ROUNDS)  # the first one is not timed
        probes = {value: probe(task.run, task.side, device, iterations) for value, task in tasks.items()}
        yield found(name, "seconds", {value: one.seconds for value, one in probes.items()})
        if measurable(device):
            yield found(name, "bytes", {value: one.memory for value, one in probes.items()})


def found(axis: str, unit: Unit, curve: Curve) -> Found:
    """The fitted exponent as a row, whose spread is that of the exponents between neighbouring values."""
    title = f"iteration's {'time' if unit == 'seconds' else 'memory'} against {axis}"
    points = sorted(curve.items())
    between = [exponent(dict(pair)) for pair in pairwise(points)]
    row = Row(f"{title}: exponent", exponent(curve), None, None, (min(between), max(between)), "growth")
    return Found(title, unit, {f"{value:g}": [cost] for value, cost in points}, (row,))


def exponent(curve: Curve) -> float:
    """Slope of the least-squares line through the points' logarithms."""
    return float(np.polyfit(np.log(list(curve.keys())), np.log(list(curve.values())), 1)[0])


def draw(founds: Sequence[Found], path: Path) -> None:
    """One panel for each curve of the growth suite, both axes logarithmic, with the fitted line."""
    units: tuple[Unit, Unit] = ("seconds", "bytes")
    rows = [[one for one in founds if one.unit == unit] for unit in units]
    rows = [row for row in rows if row]
    figure = Figure(figsize=(3 * len(rows[0]), 2.8 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for ax, one in zip(line, row, strict=True):
            _panel(ax, one)
    with drafted(path) as draft:
        figure.savefig(draft, format="png", dpi=150)


def _panel(ax: Axes, one: Found) -> None:
    values, costs = [float(value) for value in one.measured], [cost for (cost,) in one.measured.values()]
    slope, level = np.polyfit(np.log(values), np.log(costs), 1)
    ax.loglog(values, costs, "o", color=COLOURS[0])
    ax.loglog(values, np.exp(level) * np.array(values) ** slope, DASHES[1], color=COLOURS[1], label=f"exponent {slope:.2f}")
    ax.set(xlabel=one.title.rpartition(" against ")[2], ylabel=one.unit)
    ax.set_xticks(values, labels=list(one.measured))
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)

"""Figures from Records alone. Each function draws one figure, PNG or PDF by the path's suffix; if no Record has the necessary
data, it writes nothing and returns False. Deviations are sample deviations over seeds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from advmoe.evaluation.record import Record
from advmoe.reports.attacks import attack_title
from advmoe.reports.cells import interval, summarise
from advmoe.reports.collect import Cell, cell_of, is_full_scale
from advmoe.reports.figures import save, short
from advmoe.reports.measures import SUMMARY, worst_of
from advmoe.reports.panels import (
    Line,
    by_line,
    by_panel,
    draw_curve,
    grouped,
    label_of,
    legend_below,
    mean_and_std,
    radius,
    scale_of,
    setting_of,
    style_of,
    titled,
)
from advmoe.reports.routes import fig_a1, load_heat_map

DRAWN = {measure.name: measure for measure in SUMMARY if measure.robust}


def fig7(records: list[Record], path: Path) -> bool:
    """Robust accuracies of the five robust methods against model scale (Fig. 7): one row of panels for each setting in which a
    method has several scales."""
    robust = [record for record in records if record.method != "standard"]
    settings = {setting: members for setting, members in grouped(robust, setting_of).items() if _scales(members)}
    if not settings:
        return False
    names = [
        name for name in DRAWN if any(DRAWN[name].value(record) is not None for members in settings.values() for record in members)
    ]
    figure = Figure(figsize=(3.3 * len(names), 3.4 * len(settings) + 0.7), layout="constrained")
    rows = figure.subfigures(len(settings), 1, squeeze=False)[:, 0]
    axes = []
    for row, (setting, members) in zip(rows, settings.items(), strict=True):
        row.suptitle(titled(setting, members), fontsize=9)
        axes += list(row.subplots(1, len(names), squeeze=False, sharey=True)[0])
        for ax, name in zip(axes[-len(names) :], names, strict=True):
            _against_scale(ax, name, members)
        axes[-len(names)].set_ylabel("accuracy, %")
    legend_below(figure, axes)
    save(figure, path)
    return True


def _scales(records: Iterable[Record]) -> bool:
    """Whether a method was run at several model scales."""
    return any(len({scale_of(record) for record in members}) > 1 for members in by_line(records).values())


def _against_scale(ax: Axes, name: str, records: Sequence[Record]) -> None:
    title, value = DRAWN[name].label, DRAWN[name].value
    lines = by_line(record for record in records if value(record) is not None)
    for line, members in lines.items():
        at = sorted(grouped(members, scale_of).items())
        points = [mean_and_std([value(record) or 0.0 for record in runs]) for _, runs in at]
        means, stds = [mean for mean, _ in points], [std for _, std in points]
        style, label = style_of(line), label_of(line)
        if is_full_scale(line.method):
            ax.axhline(means[0], color=style.colour, linestyle=style.dash, linewidth=0.8)
        ax.errorbar(
            [scale for scale, _ in at], means, yerr=stds, color=style.colour, linestyle=style.dash, **style.marks(5),
            capsize=2, label=label,
        )  # fmt: skip
    ax.set(title=title, xlabel="model scale r")
    ax.set_xticks(sorted({scale_of(record) for record in records}))
    ax.grid(alpha=0.3)


def fig_a2(records: list[Record], path: Path) -> bool:
    """SA and RA on held-out images after every epoch, mean and band over seeds (Fig. A2)."""
    panels = by_panel(record for record in records if record.history)
    if not panels:
        return False
    figure = Figure(figsize=(9, 3.5 * len(panels) + 0.7), layout="constrained")
    rows = figure.subfigures(len(panels), 1, squeeze=False)[:, 0]
    for row, (title, members) in zip(rows, panels, strict=True):
        row.suptitle(title, fontsize=9)
        pair = row.subplots(1, 2, sharey=True)
        for ax, name, text in zip(pair, ("val_sa", "val_ra"), ("SA", "RA (PGD-10)"), strict=True):
            _trajectories(ax, members, name)
            ax.set(title=f"{text} on held-out images", xlabel="epoch", ylim=(0, 100))
        pair[0].set_ylabel("accuracy, %")
    legend_below(figure, figure.axes)
    save(figure, path)
    return True


def _trajectories(ax: Axes, records: Iterable[Record], name: str) -> None:
    for line, members in by_line(records).items():
        epochs = min(len(record.history) for record in members)  # a run that was cut short shortens its method's mean
        rows = [record.history[:epochs] for record in members]
        label = label_of(line)
        if any(row.phase > 1 for row in rows[0]):
            label += ", masks, then weights"
        draw_curve(ax, line, [row.epoch for row in rows[0]], [[getattr(row, name) for row in run] for run in rows], label)
    ax.grid(alpha=0.3)


def epsilon(records: list[Record], path: Path) -> bool:
    """Accuracy against epsilon. If it does not fall towards 0 at a large epsilon, the attack failed; the network is not robust."""
    panels = by_panel(record for record in records if record.epsilon_curve and record.epsilon > 0)
    if not panels:
        return False
    figure = Figure(figsize=(6.4, 3.8 * len(panels) + 0.7), layout="constrained")
    for ax, (title, members) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        _against_epsilon(ax, members)
        ax.set_title(title, fontsize=9)
    legend_below(figure, figure.axes)
    save(figure, path)
    return True


def _against_epsilon(ax: Axes, records: Sequence[Record]) -> None:
    first = records[0]
    assert first.epsilon_curve is not None
    for line, members in by_line(records).items():
        curves = [record.epsilon_curve for record in members if record.epsilon_curve]
        multiples = [value / first.epsilon for value in curves[0].epsilons]
        draw_curve(ax, line, multiples, [curve.ra for curve in curves], label_of(line))
    ax.axvline(1, color="#767676", linewidth=0.8)
    attack = attack_title(first.epsilon_curve.attack)
    ax.set(xlabel=f"radius of the attack, times {radius(first.epsilon)}", ylabel=f"accuracy under {attack}, %", ylim=(0, 100))
    text = f"{first.epsilon_curve.images} images"
    ax.annotate(text, (1, 1), (-4, -4), xycoords="axes fraction", textcoords="offset points", ha="right", va="top")
    ax.grid(alpha=0.3)


def frontier(records: list[Record], path: Path) -> bool:
    """RA-worst against GMACs, one panel for each setting with several networks; quick figures have separate panels.

    A ring and a line mark the networks on the frontier: no cheaper network is as robust.
    """
    panels = {key: members for key, members in grouped(records, _frontier_key).items() if len(grouped(members, cell_of)) > 1}
    if not panels:
        return False
    figure = Figure(figsize=(6.4, 4.2 * len(panels) + 0.8), layout="constrained")
    for ax, ((setting, name), members) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        _against_cost(ax, name, members)
        ax.set_title(titled(setting, members), fontsize=9)
    legend_below(figure, figure.axes)
    save(figure, path)
    return True


def _frontier_key(record: Record) -> tuple[Cell, str]:
    """The setting without the network, and the worst case's measure."""
    return replace(setting_of(record), backbone="", width=None), worst_of(record).name


ASIDE = 1.06  # networks of almost equal cost are drawn side by side, apart by this factor
Point = tuple[float, float, tuple[float, float], Line, str]  # GMACs, mean, its 95 % interval, line, name


def _against_cost(ax: Axes, name: str, records: Sequence[Record]) -> None:
    lines, several = by_line(records), len({record.backbone for record in records}) > 1
    points = [point for line, members in lines.items() for point in _points(line, members, name, several)]
    costs, drawn_at = [gmacs for gmacs, *_ in points], {}
    for number, (gmacs, mean, (low, high), line, text) in enumerate(points):
        style = style_of(line)
        beside = sum(abs(cost - gmacs) < 0.03 * gmacs for cost in costs[:number])
        x = drawn_at[gmacs, mean] = gmacs * ASIDE**beside
        ax.errorbar(
            x, mean, yerr=[[mean - low], [high - mean]], color=style.colour, linestyle="", **style.marks(7), capsize=2,
            label=label_of(line),
        )  # fmt: skip
        ax.annotate(text, (x, mean), (7, 5), textcoords="offset points", fontsize=7)
    best = on_frontier([(gmacs, mean) for gmacs, mean, *_ in points])
    xs, ys = [drawn_at[point] for point in best], [mean for _, mean in best]
    ax.plot(xs, ys, color="#767676", linewidth=0.9, zorder=0)
    ax.scatter(xs, ys, s=170, facecolors="none", edgecolors="#333333", linewidths=1.1, label="on the frontier")
    ax.set(xlabel="GMACs of one image", ylabel=f"{DRAWN[name].label}, %")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.12, y=0.12)
    ax.grid(alpha=0.3)


def _points(line: Line, records: Sequence[Record], name: str, with_backbone: bool) -> list[Point]:
    """One point for each network of the line whose seeds were attacked by the same attacks: the mean over the seeds."""
    return [
        (
            summary.figures["gmacs"].mean,
            summary.figures[name].mean,
            interval(summary, name),
            line,
            f"{short(summary.cell.backbone)}, " * with_backbone + f"r {summary.cell.model_scale:g}",
        )
        for summary in summarise(records)
        if name in summary.figures
    ]


def on_frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, accuracy), by rising cost, that are more accurate than every point of the same or a lower cost."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best


FIGURES: Mapping[str, Callable[[list[Record], Path], bool]] = {
    "fig7": fig7,
    "figA2": fig_a2,
    "figA1": fig_a1,
    "load": load_heat_map,
    "frontier": frontier,
    "epsilon": epsilon,
}

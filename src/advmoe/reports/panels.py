"""Shared parts of the figures: the Records of each panel, curves of means over seeds, legends, files."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from advmoe.evaluation.record import Record
from advmoe.files import drafted
from advmoe.reports.cell import Cell, Runs, cell_of, grouped, is_full_scale, is_routed, options_text
from advmoe.reports.styles import VARIANTS, Line, in_words, method_style, style_of
from advmoe.reports.summaries import figure

DPI = 150
MAX_NAME = 28  # characters of a name in a figure
LEGEND_WIDTH = 30  # characters
FEW_LINES = 16  # in a figure; each of them has its own label


def by_line(runs: Iterable[Runs], cell: Callable[[Runs], Cell]) -> dict[Line, list[Runs]]:
    """Records or summaries by line, in order of first occurrence; `cell` returns the cell of one."""

    def line(one: Runs) -> Line:
        it = cell(one)
        return Line(it.method, it.num_experts if is_routed(it.method) else 0, it.variant, it.ingredients, it.choice)

    return grouped(runs, line)


def by_panel(records: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    """Titled panels: Records by setting and model scale. The dense network is in the panel of every scale."""
    panels = []
    for setting, members in grouped(records, lambda record: cell_of(record).setting).items():
        scales = sorted({cell_of(record).model_scale for record in members if not is_full_scale(record.method)})
        for scale in scales or [1.0]:
            chosen = [record for record in members if is_full_scale(record.method) or cell_of(record).model_scale == scale]
            counts = [len(runs) for runs in grouped(chosen, cell_of).values()]
            panels.append((titled(setting, counts, f"model scale r = {scale:g}, " if scales else ""), chosen))
    return panels


def titled(setting: Cell, counts: Iterable[int], detail: str = "") -> str:
    """The setting as text, and the number of seeds of its networks, from the `counts` of each."""
    counts = sorted(set(counts))
    seeds = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    named = replace(setting, dataset=short(setting.dataset), backbone=short(setting.backbone), norm=short(setting.norm))
    return f"{in_words(named)}\n{detail}{seeds} seed{'s' if counts[-1] > 1 else ''}"


def labels_of(lines: Collection[Line]) -> dict[Line, str]:
    """What the legend of a figure calls each of its lines: the title of the style, and N of a network with experts, in rows of
    LEGEND_WIDTH. With more than FEW_LINES, lines of a method that look the same share a label."""
    styles = {line: style_of(line) for line in lines}
    alike = grouped(lines, lambda line: (line.method, replace(styles[line], title="") if len(lines) > FEW_LINES else line))
    labels: dict[Line, str] = {}
    for group in alike.values():
        first = group[0]
        variant = first.variant if first.variant in VARIANTS else ""
        shared = f"{method_style(first.method).title}{options_text(variant)}, other options"
        title = styles[first].title if len(group) == 1 else shared
        experts = f", N {first.num_experts}" if first.num_experts else ""
        labels |= dict.fromkeys(group, fill(title + experts, LEGEND_WIDTH))
    return labels


def draw_curve(ax: Axes, line: Line, xs: Sequence[float], curves: Sequence[Sequence[float]], label: str) -> None:
    """Draw the mean over seeds of `curves` [seeds][points], and a band of one sample deviation."""
    style = style_of(line)
    figures = [figure(values) for values in zip(*curves, strict=True)]
    means, stds = np.array([(one.mean, one.std or 0.0) for one in figures]).T
    every = max(1, len(xs) // 10)
    ax.plot(
        xs, means, color=style.colour, linestyle=style.dash, **style.marks(5), markevery=every, label=label,
    )  # fmt: skip
    if len(curves) > 1:
        ax.fill_between(xs, means - stds, means + stds, color=style.colour, alpha=0.18, linewidth=0)


def legend_below(figure: Figure, axes: Iterable[Axes]) -> None:
    """One legend for the whole figure, each label once, in as many columns as fit, up to three."""
    handles: dict[str, Artist] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for columns in (3, 2, 1):
        legend = figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def short(name: str) -> str:
    """A name from data on one line, cut to MAX_NAME characters."""
    line = " ".join(name.split())
    return line if len(line) <= MAX_NAME else f"{line[: MAX_NAME - 1]}…"


def save(figure: Figure, path: Path) -> None:
    """PNG or PDF, by the path's suffix. Texts are drawn literally: a $ in a name from the data does not start a formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with drafted(path) as draft:
        figure.savefig(draft, format=path.suffix[1:], dpi=DPI)

"""Shared parts of the figures: the style of each method, the Records of each panel, means over seeds, files."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from advmoe.config.schema import fraction_text
from advmoe.evaluation.record import Record
from advmoe.files import drafted
from advmoe.reports.cells import figure
from advmoe.reports.collect import OFFICIAL, SAME_BATCHES, Cell, Runs, cell_of, grouped, is_full_scale, is_routed, options_text

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, safe for the colour-blind
DPI = 150
MAX_NAME = 28  # characters of a name in a figure
LEGEND_WIDTH = 30  # characters


class Line(NamedTuple):
    """What the runs of one line of a panel share: the method, N (0 without experts), and the options (see `Cell`)."""

    method: str
    num_experts: int
    variant: str
    ingredients: str


@dataclass(frozen=True)
class Style:
    """How runs are drawn in all figures. Colour, dash and marker each identify the method, so the figures work in black and white;
    `fill`, the filled part of the markers, identifies the number of experts, and `edge`, the colour of their outline, runs with
    other options.
    """

    title: str
    colour: str
    dash: str | tuple[int, tuple[int, ...]]
    marker: str
    fill: str = "full"
    edge: str | None = None

    def marks(self, points: float) -> dict[str, Any]:
        """The arguments of `Axes.plot` and `Axes.errorbar` that draw markers of this size."""
        hollow = self.fill == "hollow"
        face = {"markerfacecolor": "white" if hollow else self.colour, "markerfacecoloralt": "white"}
        digits = {"markersize": 2 * points, "markeredgewidth": 0.5} if self.marker.startswith("$") else {"markersize": points}
        edge = {} if self.edge is None else {"markeredgecolor": self.edge}
        return {"marker": self.marker, "fillstyle": "full" if hollow else self.fill, **face, **digits, **edge}


METHOD_STYLES = {
    "advmoe": Style("AdvMoE", COLOURS[0], "-", "o"),
    "at_dense": Style("AT (Dense)", "#000000", (0, (1, 1)), "s"),
    "at_small_dense": Style("AT (S-Dense)", COLOURS[1], "--", "^"),
    "at_sparse": Style("AT (Sparse)", COLOURS[2], "-.", "D"),
    "at_moe": Style("AT (MoE)", COLOURS[3], (0, (5, 1, 1, 1, 1, 1)), "v"),
    "standard": Style("standard training", COLOURS[4], ":", "X"),
}
VARIANTS: dict[str, tuple[str, tuple[int, tuple[int, ...]], str]] = {  # colour, dash and marker
    SAME_BATCHES: (COLOURS[5], (0, (8, 2)), "h"),
    OFFICIAL: ("#882255", (0, (3, 1, 1, 1)), "p"),
}
OTHER = Style("other", "#767676", "-", "P")
FILLS = {1: "hollow", 2: "full", 3: "top", 4: "bottom", 8: "left", 16: "right"}  # by N; for other N the marker is the number


def method_style(method: str) -> Style:
    """The method's style; a default style with the method's name if this package does not know the method."""
    return METHOD_STYLES.get(method) or replace(OTHER, title=method)


def style_of(runs: Cell | Line) -> Style:
    """The style of runs of one method. The `VARIANTS` have another colour, dash and marker. Markers of runs with other options are
    outlined in black, and runs with different numbers of experts have different marks."""
    style = method_style(runs.method)
    if runs.variant in VARIANTS:
        colour, dash, marker = VARIANTS[runs.variant]
        style = replace(style, colour=colour, dash=dash, marker=marker)
    if runs.ingredients or runs.variant not in ("", *VARIANTS):
        style = replace(style, edge="black")
    style = replace(style, title=style.title + options_text(runs.variant, runs.ingredients))
    if not is_routed(runs.method):
        return style
    if runs.num_experts in FILLS:
        return replace(style, fill=FILLS[runs.num_experts])
    return replace(style, marker=f"${runs.num_experts}$")


def network_title(cell: Cell) -> str:
    """'AdvMoE, r 0.5, N 2'."""
    return style_of(cell).title + cell.size


def run_title(record: Record) -> str:
    """'AdvMoE, r 0.5, N 2, resnet18, fashion-mnist, seed 0'."""
    return f"{network_title(cell_of(record))}, {record.backbone}, {record.dataset}, seed {record.seed}"


def setting_of(record: Record) -> Cell:
    """The setting of a Record; Records of one setting can be compared."""
    return cell_of(record).setting


def by_line(runs: Iterable[Runs], cell: Callable[[Runs], Cell]) -> dict[Line, list[Runs]]:
    """Records or summaries by line, in the order of `METHOD_STYLES`; `cell` returns the cell of one."""

    def line(one: Runs) -> Line:
        it = cell(one)
        return Line(it.method, it.num_experts if is_routed(it.method) else 0, it.variant, it.ingredients)

    order = list(METHOD_STYLES)
    groups = grouped(runs, line)
    return dict(sorted(groups.items(), key=lambda item: (order.index(item[0].method) if item[0].method in order else 99, item[0])))


def by_panel(records: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    """Titled panels: Records by setting and model scale. The dense network is in the panel of every scale."""
    panels = []
    for setting, members in grouped(records, setting_of).items():
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


def in_words(setting: Cell) -> str:
    """'fashion-mnist, resnet18 (width 16), 6 epochs', and a second line of images, training attack and threat model."""
    network = f"{setting.backbone}, " if setting.width is None else f"{setting.backbone} (width {setting.width}), "
    epochs = f"{setting.epochs} epoch{'s' * (setting.epochs != 1)}"
    return (
        f"{setting.dataset}, {network if setting.backbone else ''}{epochs} on {setting.train_images} images,\n"
        f"{setting.test_images} test images, {setting.attack_steps} attack steps in training, "
        f"{radius(setting.epsilon)} in {setting.norm}"
    )


def setting_text(setting: Cell) -> str:
    """`in_words` on one line."""
    return " ".join(in_words(setting).split())


def radius(epsilon: float) -> str:
    """'epsilon 8/255' for a whole number of 255ths below 64, else 'epsilon 0.1'."""
    return f"epsilon {fraction_text(epsilon) if 255 * epsilon < 64 else f'{epsilon:g}'}"


def label_of(line: Line) -> str:
    """Legend: the title of the style, and N of a network with experts, in lines of LEGEND_WIDTH."""
    title = style_of(line).title + (f", N {line.num_experts}" if line.num_experts else "")
    return fill(title, LEGEND_WIDTH)


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

"""How networks, settings and attacks are named and drawn in all tables and figures."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from advmoe.config.schema import fraction_text
from advmoe.evaluation.record import Record
from advmoe.reports.cell import OFFICIAL, SAME_BATCHES, Cell, cell_of, is_routed, options_text
from advmoe.wording import number_of

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, safe for the colour-blind


class Line(NamedTuple):
    """What the runs of one line of a panel share: the method, N (0 without experts), and the options (see `Cell`)."""

    method: str
    num_experts: int
    variant: str
    ingredients: str
    choice: str


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
    if runs.choice or runs.ingredients or runs.variant not in ("", *VARIANTS):
        style = replace(style, edge="black")
    style = replace(style, title=style.title + options_text(runs.variant, runs.ingredients, runs.choice))
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


def attack_title(name: str) -> str:
    """'PGD-50' for pgd_50."""
    return name.upper().replace("_", "-")


def in_words(setting: Cell) -> str:
    """'fashion-mnist, resnet18 (width 16), 6 epochs', and a second line of images, training attack and threat model."""
    network = f"{setting.backbone}, " if setting.width is None else f"{setting.backbone} (width {setting.width}), "
    epochs = number_of(setting.epochs, "epoch")
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

"""Figures of routing, from Records: the MoE structure with one image's pathway, and the load of the experts by class."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from advmoe.evaluation.record import Record
from advmoe.evaluation.record_snapshot import GalleryImage, columns
from advmoe.reports.cell import cell_of, grouped
from advmoe.reports.panels import save, short
from advmoe.reports.styles import attack_title, style_of

CHOSEN, CHANGED, PALE = "#009E73", "#D55E00", "#E6E6E6"
ROUND = "round,pad=0,rounding_size=0.12"
ARROW: dict[str, str | int] = {"arrowstyle": "-|>", "color": "#333333", "shrinkA": 0, "shrinkB": 0}
MAX_LABELS = 30  # class names beside a heat map; with more classes only every k-th is named


def fig_a1(records: list[Record], path: Path) -> bool:
    """One MoE layer of a trained network, and one test image's pathway through all of them (after Fig. A1).

    Draws the Record with layers and images that is closest to the appendix's N = 4, r = 0.25.
    """
    drawable = [record for record in records if record.layers and _routed(record)]
    if not drawable:
        return False
    record = min(drawable, key=_unlike_the_appendix)
    layers, image = record.layers, _routed(record)[0]
    max_experts = max(layer.experts for layer in layers)
    figure = Figure(figsize=(max(8.0, 2.6 + 0.5 * len(layers)), 5.6 + 0.4 * max_experts), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[1, 1 + 0.12 * max_experts])
    _draw_layer(above, record, image.clean.pathway[0])
    _draw_pathway(below, record, image)
    save(figure, path)
    return True


def _routed(record: Record) -> list[GalleryImage]:
    """Images of the gallery with a route; those that are classified correctly and rerouted under attack come first."""
    images = [image for image in record.gallery if image.clean.pathway]
    return sorted(images, key=lambda image: (image.clean.prediction != image.label, not _flips(image)))


def _flips(image: GalleryImage) -> int:
    """Number of layers that the attack reroutes."""
    return sum(a != b for a, b in zip(image.clean.pathway, image.adversarial.pathway, strict=True))


def _unlike_the_appendix(record: Record) -> tuple[bool, int, float, int]:
    cell = cell_of(record)
    return cell.method != "advmoe" or not cell.is_of_the_paper, abs(cell.num_experts - 4), abs(cell.model_scale - 0.25), record.seed


def _draw_layer(ax: Axes, record: Record, chosen: int) -> None:
    """Draw the first MoE layer: input, router, the experts as windows of the layer's filters, output."""
    layer, model = record.layers[0], record.config.model
    experts = layer.experts
    ax.set_title(f"MoE layer {short(layer.name)}: N = {experts}, r = {model.model_scale:g}", fontsize=10)
    ax.set(xlim=(0, 12), ylim=(-0.4, 4.4))
    ax.axis("off")
    _box(ax, 0.1, 0.7, 1.9, f"input\n{layer.in_channels} channels")
    routers = record.config.section("model").get("routers")
    of_network = routers == "per_network"
    title = "router of the stage" if routers == "per_stage" else "router"
    _box(ax, 2.4, 3.1, 2.6, "router of all layers\na CNN on the image" if of_network else f"{title}\npool, standardise, linear")
    _box(ax, 10.0, 0.7, 1.9, f"output, {' x '.join(map(str, layer.size))}\n{layer.width} channels")
    share = 1 / experts if record.config.section("model").get("bank") == "disjoint" else model.model_scale
    step = 2.5 / experts
    middle = 2.5 - (chosen + 0.6) * step
    edge = 5.2 + 4.0 * chosen * (1 - share) / max(experts - 1, 1)
    for expert in range(experts):
        start = 5.2 + 4.0 * expert * (1 - share) / max(experts - 1, 1)
        _window(ax, (start, 2.5 - (expert + 1) * step), (4.0 * share, 0.8 * step), f"expert {expert}", expert == chosen)
    for end, begin in (((edge, middle), (2.0, 1.25)), ((10.0, 1.25), (edge + 4.0 * share, middle))):
        ax.annotate("", end, begin, arrowprops=ARROW | {"color": CHOSEN, "linewidth": 2})
    if not of_network:
        ax.annotate("", (2.9, 3.1), (1.6, 1.8), arrowprops=ARROW)
    ax.annotate("", (edge + 2 * share, 2.5 - chosen * step - 0.2 * step), (5.0, 3.65), arrowprops=ARROW)
    ax.text(6.6, 3.65, f"top-1: expert {chosen}", color="#00654A", va="center", weight="bold", fontsize=9)
    ax.text(7.2, -0.3, f"the layer's filters, left to right; each expert has {layer.width} of them", ha="center", fontsize=8)


def _box(ax: Axes, x: float, y: float, wide: float, text: str) -> None:
    ax.add_patch(FancyBboxPatch((x, y), wide, 1.1, boxstyle=ROUND, facecolor="white", edgecolor="#333333"))
    ax.text(x + wide / 2, y + 0.55, text, ha="center", va="center", fontsize=8)


def _window(ax: Axes, corner: tuple[float, float], size: tuple[float, float], text: str, chosen: bool) -> None:
    fill, ink, line, weight = (CHOSEN, "white", 2.0, "bold") if chosen else (PALE, "black", 0.6, "normal")
    ax.add_patch(Rectangle(corner, *size, facecolor=fill, edgecolor="#333333", linewidth=line))
    centre = corner[0] + size[0] / 2, corner[1] + size[1] / 2
    ax.text(*centre, text, ha="center", va="center", fontsize=8, color=ink, weight=weight)


def _draw_pathway(ax: Axes, record: Record, image: GalleryImage) -> None:
    """Draw all layers in order with their experts as cells, the clean image's pathway, and the pathway under attack."""
    layers, clean, adversarial = record.layers, image.clean, image.adversarial
    attack = attack_title(short(image.attack))
    names = [short(name) for name in record.classes]
    routes = [[view.pathway[column] for column in columns(layers, len(view.pathway))] for view in (clean, adversarial)]
    for x, (layer, expert_clean, expert_attacked) in enumerate(zip(layers, *routes, strict=True)):
        for expert in range(layer.experts):
            _window(ax, (x - 0.36, expert - 0.36), (0.72, 0.72), str(expert), expert == expert_clean)
        if expert_attacked != expert_clean:
            corner = (x - 0.36, expert_attacked - 0.36)
            ax.add_patch(Rectangle(corner, 0.72, 0.72, fill=False, edgecolor=CHANGED, linewidth=2, hatch="///"))
    max_experts = max(layer.experts for layer in layers)
    ax.plot(range(len(layers)), routes[0], color=CHOSEN, linewidth=2.5, zorder=0, label="clean image")
    ax.plot(range(len(layers)), routes[1], color=CHANGED, linestyle="--", zorder=0, label=f"under {attack}")
    inset = ax.inset_axes((-2.6, (max_experts - 1) / 2 - 0.8, 1.6, 1.6), transform=ax.transData)
    inset.imshow(png_pixels(clean.png), cmap="gray")
    inset.set(xticks=[], yticks=[])
    inset.set_title(class_name(names, image.label), fontsize=8)
    answers = f"answer: {class_name(names, clean.prediction)}\n\nunder attack:\n{class_name(names, adversarial.prediction)}"
    ax.text(len(layers) - 0.3, (max_experts - 1) / 2, answers, fontsize=8, va="center")
    ax.set(xlim=(-2.8, len(layers) + 1.8), ylim=(max_experts - 0.3, -0.7))
    ax.set_xticks(range(len(layers)), [f"{short(layer.name)}, {layer.width}" for layer in layers], rotation=90, fontsize=7)
    ax.set_xlabel("MoE layer, and how many filters each of its experts has", fontsize=8)
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    where = f"{short(style_of(cell_of(record)).title)}, {short(record.backbone)}, {short(record.dataset)}"
    ax.set_title(
        f"{where}: {attack} changes the choice of {_flips(image)} of {len(clean.pathway)} routers",
        fontsize=10,
    )
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.02), ncols=2, frameon=False, fontsize=8)


def png_pixels(png: str) -> np.ndarray[Any, Any]:
    """The pixels [H, W] or [H, W, 3] of a PNG in base64, uint8."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def class_name(names: Sequence[str] | None, label: int) -> str:
    """A class's name, or 'class 3' if the Record has no names."""
    return names[label] if names and label < len(names) else f"class {label}"


def load_heat_map(records: list[Record], path: Path) -> bool:
    """The share of each class's clean images that every expert takes, layer by layer, for the first seed of each routed network.

    Networks with one expert are left out: it takes all images.
    """
    cells = grouped((record for record in records if record.load_by_class and not cell_of(record).has_one_expert), cell_of)
    if not cells:
        return False
    chosen = [min(runs, key=lambda record: record.seed) for runs in cells.values()]
    wide = max(sum(len(layer[0]) for layer in record.load_by_class) for record in chosen)
    tall = [max(1.2, 0.2 * min(len(record.load_by_class[0]), MAX_LABELS)) for record in chosen]
    figure = Figure(figsize=(max(7.0, 2.5 + 0.15 * wide), sum(tall) + 1.3 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 1, squeeze=False, height_ratios=tall)[:, 0]
    for ax, record in zip(axes, chosen, strict=True):
        image = _draw_load(ax, record)
    figure.colorbar(image, ax=list(axes), label="share of the class's images, %", shrink=min(1.0, 4 / sum(tall)), pad=0.01)
    save(figure, path)
    return True


def _draw_load(ax: Axes, record: Record) -> Any:
    """Draw one row a class, one column an expert, and a white line between layers."""
    layers = [np.array(counts, dtype=float) for counts in record.load_by_class]
    shares = np.hstack([100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) for counts in layers])
    image = ax.imshow(shares, cmap="cividis", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    ends = np.cumsum([counts.shape[1] for counts in layers])
    for end in ends[:-1]:
        ax.axvline(end - 0.5, color="white", linewidth=2)
    classes = range(0, len(shares), -(-len(shares) // MAX_LABELS))
    ax.set_yticks(classes, [short(class_name(record.classes, label)) for label in classes], fontsize=7)
    middles = [end - counts.shape[1] / 2 - 0.5 for end, counts in zip(ends, layers, strict=True)]
    ax.set_xticks(middles, [str(number + 1) for number in range(len(layers))], fontsize=7)
    ax.set_xlabel(f"MoE layer, its experts 0 to {layers[0].shape[1] - 1} from left to right", fontsize=8)
    cell = cell_of(record)
    network = f"{short(style_of(cell).title)}, N = {cell.num_experts}, r = {cell.model_scale:g}"
    ax.set_title(f"{network}: {short(cell.dataset)}, {short(cell.backbone)}, seed {record.seed}", fontsize=9)
    return image

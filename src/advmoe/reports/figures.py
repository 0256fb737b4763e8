"""Figures from training histories and images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from advmoe.attacks import frozen
from advmoe.files import drafted
from advmoe.models import Classifier
from advmoe.moe import Routings

MAGNIFIED = 4  # the perturbation is drawn this many times as large, around mid-grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, safe for the colour-blind
DPI = 150
MAX_NAME = 28  # characters of a name in a figure
DASHES = ("-", "--", "-.", ":")


def trajectories(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """SA and RA on the held-out part after every epoch, one line for each method (after the appendix's Fig. A2)."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, (method, history) in enumerate(histories.items()):
        epochs = [row["epoch"] for row in history]
        for ax, name in zip(axes, ("val_sa", "val_ra"), strict=True):
            values = [row[name] for row in history]
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)], "marker": "o"}
            ax.plot(epochs, values, label=short(method), markersize=3, **style)
    for ax, title in zip(axes, ("SA", "RA (PGD-10)"), strict=True):
        ax.set(title=f"{title} on held-out images", xlabel="epoch", ylim=(0, 100))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, %")
    axes[1].legend()
    save(figure, path)


@dataclass(frozen=True)
class LabelAndRoute:
    """A network's answer for an image: the predicted class's name and the route, one digit for each MoE layer."""

    label: str
    route: str


@torch.no_grad()
def labels_and_routes(model: Classifier, x: Tensor, classes: Sequence[str]) -> list[LabelAndRoute]:
    """Predictions and routes of images [B, C, H, W]."""
    with frozen(model):
        logits, routings = model.forward_routed(x)
    labels = logits.argmax(dim=1).tolist()
    return [LabelAndRoute(classes[label], _route(routings, row)) for row, label in enumerate(labels)]


def image_grid(model: Classifier, x: Tensor, x_adv: Tensor, labels: Tensor, classes: Sequence[str], path: Path) -> None:
    """One row for each image: clean, magnified perturbation, adversarial, with both predictions and both routes."""
    classes = [short(name) for name in classes]
    clean, adversarial = labels_and_routes(model, x, classes), labels_and_routes(model, x_adv, classes)
    figure = Figure(figsize=(6.6, 1.9 * len(x)), layout="constrained")
    axes = figure.subplots(len(x), 3, squeeze=False)
    for row in range(len(x)):
        perturbation = (0.5 + MAGNIFIED * (x_adv[row] - x[row])).clamp(0, 1)
        truth = classes[int(labels[row])]
        _draw(axes[row][0], x[row], _titled(clean[row].label, truth), f"truth: {truth}\n{clean[row].route}")
        _draw(axes[row][1], perturbation, f"perturbation x {MAGNIFIED}", _changed(clean[row].route, adversarial[row].route))
        _draw(axes[row][2], x_adv[row], _titled(adversarial[row].label, truth), f"adversarial\n{adversarial[row].route}")
    save(figure, path)


def _titled(label: str, truth: str) -> str:
    return label if label == truth else f"{label} (wrong)"


def _draw(ax: Axes, image: Tensor, title: str, below: str) -> None:
    pixels = image.detach().cpu().permute(1, 2, 0).numpy()
    ax.imshow(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(below, fontsize=7, family="monospace")
    ax.set_xticks([])
    ax.set_yticks([])


def _route(routings: Routings, row: int) -> str:
    digits = "".join(f"{int(routing.experts[row]):x}" for routing in routings)
    return " ".join(digits[start : start + 4] for start in range(0, len(digits), 4))


def _changed(clean: str, adversarial: str) -> str:
    flips = sum(a != b for a, b in zip(clean, adversarial, strict=True))
    return f"{flips} of {len(clean.replace(' ', ''))} layers rerouted" if clean else ""


def save(figure: Figure, path: Path) -> None:
    """PNG or PDF, by the path's suffix. Texts are drawn literally: a $ in a name from the data does not start a formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with drafted(path) as draft:
        figure.savefig(draft, format=path.suffix[1:], dpi=DPI)


def short(name: str) -> str:
    """A name from data on one line, cut to MAX_NAME characters."""
    line = " ".join(name.split())
    return line if len(line) <= MAX_NAME else f"{line[: MAX_NAME - 1]}…"

"""The gallery of a Record's test images for the report's page: clean and under attack, at each epsilon of the slider."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from PIL import Image

from advmoe.evaluation.record import Record
from advmoe.evaluation.record_snapshot import GalleryImage, View
from advmoe.reports.routes import class_name, png_pixels
from advmoe.reports.styles import attack_title, radius

MAX_MAGNIFICATION = 100  # a larger multiple of the evaluation's epsilon is printed as a plain epsilon


@dataclass(frozen=True)
class Side:
    """An image and the network's answer: the PNG in base64, the predicted class, its confidence as text, whether it is right."""

    png: str
    answer: str
    confidence: str
    right: bool


@dataclass(frozen=True)
class Layer:
    """A router's choice on the clean and on the attacked image."""

    number: int
    clean: int
    adversarial: int

    @property
    def changed(self) -> bool:
        """Whether the attack reroutes the image in this layer."""
        return self.clean != self.adversarial


@dataclass(frozen=True)
class Step:
    """An image at one position of the epsilon slider. `change` is the PNG of the perturbation, "" if it cannot be drawn."""

    number: int
    kind: str
    attacked: Side
    change: str
    route: tuple[Layer, ...]

    @property
    def summary(self) -> str:
        """How many layers the attack rerouted; empty for a network that does not route."""
        changed = sum(layer.changed for layer in self.route)
        return f"{changed} of {len(self.route)} routers choose another expert than for the clean image" if self.route else ""


@dataclass(frozen=True)
class GalleryEntry:
    """One entry of a gallery."""

    label: str
    row: int
    clean: Side
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Gallery:
    """The images of a run. `radii` are the positions of the epsilon slider in words, `start` is the position of the
    evaluation's epsilon; `colour` says whether the images have three channels."""

    entries: tuple[GalleryEntry, ...]
    radii: tuple[str, ...]
    start: int
    colour: bool


def gallery_of(record: Record) -> Gallery | None:
    """The gallery of a Record; None without images. The slider has the epsilons that every image has."""
    if not record.gallery:
        return None
    epsilons = _epsilons(record)
    entries = tuple(_entry(record, image, epsilons) for image in record.gallery)
    words = tuple(_in_words(epsilon, record.epsilon) for epsilon in epsilons)
    return Gallery(entries, words, epsilons.index(record.epsilon), png_pixels(record.gallery[0].clean.png).ndim == 3)


def _epsilons(record: Record) -> list[float]:
    """0, the evaluation's epsilon and those that every image has, in rising order."""
    common = set.intersection(*({step.epsilon for step in image.steps} for image in record.gallery))
    return sorted({0.0, record.epsilon, *common})


def _in_words(epsilon: float, usual: float) -> str:
    """'1/2 of epsilon 8/255'."""
    if epsilon == 0:
        return "epsilon 0"
    if epsilon == usual or epsilon > MAX_MAGNIFICATION * usual:
        return radius(epsilon)
    return f"{Fraction(epsilon / usual).limit_denominator(8)} of {radius(usual)}"


def _entry(record: Record, image: GalleryImage, epsilons: Sequence[float]) -> GalleryEntry:
    by_epsilon: dict[float, View] = {step.epsilon: step for step in image.steps}
    by_epsilon |= {0.0: image.clean, record.epsilon: image.adversarial}
    return GalleryEntry(
        class_name(record.classes, image.label), image.row, _side(record, image, image.clean),
        tuple(_step(record, image, by_epsilon[epsilon], number) for number, epsilon in enumerate(epsilons)),
    )  # fmt: skip


def _step(record: Record, image: GalleryImage, view: View, number: int) -> Step:
    pairs = zip(image.clean.pathway, view.pathway, strict=True)
    route = tuple(Layer(layer, *pair) for layer, pair in enumerate(pairs, 1))
    kind = "no attack" if view is image.clean else attack_title(image.attack)
    return Step(number, kind, _side(record, image, view), perturbation(image.clean.png, view.png), route)


def _side(record: Record, image: GalleryImage, view: View) -> Side:
    answer = class_name(record.classes, view.prediction)
    return Side(view.png, answer, f"{100 * view.confidence:.0f} %", view.prediction == image.label)


def perturbation(clean: str, attacked: str) -> str:
    """The change of each pixel as a PNG in base64: mid-grey is no change, black and white the largest. "" if the sizes differ."""
    before, after = (png_pixels(png).astype(np.int16) for png in (clean, attacked))
    if before.shape != after.shape:
        return ""
    change = after - before
    levels = 128 + change * 127 // max(1, int(np.abs(change).max()))
    file = io.BytesIO()
    Image.fromarray(levels.astype(np.uint8)).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()

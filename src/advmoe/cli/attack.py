"""`advmoe attack`."""

import json
import sys
from collections.abc import Iterator
from math import ceil
from pathlib import Path

from pydantic import BaseModel, Field
from torch import Tensor

from advmoe.attacks import frozen
from advmoe.cli.arguments.attack import AttackArguments
from advmoe.cli.device import set_up_device
from advmoe.cli.predict import pathway
from advmoe.errors import UserError, nearest, printable
from advmoe.evaluation.fooling import THOROUGH, Fooled, Victim, beyond, first_to_fool, in_eight_bits, smallest, write_image
from advmoe.evaluation.precision import full_float32
from advmoe.evaluation.shards import SLACK
from advmoe.models import fused
from advmoe.runs.load import load
from advmoe.runs.loaded import Loaded


class Prediction(BaseModel):
    """The predicted class of an image, its softmax probability, and the expert of each layer."""

    name: str = Field(serialization_alias="class")
    confidence: float
    pathway: tuple[int, ...]


class Attempt(BaseModel):
    """An attack at an epsilon, and whether it fooled the network."""

    attack: str
    epsilon: float
    fooled: bool


class Change(BaseModel):
    """An attack that fooled the network, and its epsilon."""

    attack: str
    epsilon: float


class Report(BaseModel):
    """The attacks that were tried on the image: none if the network is wrong on it without any change."""

    image: str
    note: str
    label: str
    epsilon: float
    clean: Prediction
    tried: list[Attempt] = Field(default_factory=list)


class Success(Report):
    """The first attack that fooled the network, and the smallest change that did.

    `file` holds the image of the smallest change, rounded if it is a PNG. If the rounded image does not fool, it holds the first
    image that fooled. `adversarial` is the prediction for the image in the file, `file_epsilon` its largest change of a pixel, and
    `requested` the file that --out named.
    """

    first: Change
    smallest: Change
    adversarial: Prediction
    file: str
    file_epsilon: float
    requested: str


def run(arguments: AttackArguments) -> None:
    torch_device = set_up_device(arguments.runtime.config)
    model = load(arguments.run, torch_device)
    epsilon = model.threat_model.epsilon if arguments.epsilon is None else arguments.epsilon
    if epsilon <= 0:
        raise UserError(f"{arguments.run}: was trained for epsilon 0; give --epsilon")
    image = model.read(arguments.image)
    with frozen(model), full_float32(model):
        report = _report(model, _victim(model, image.pixels.to(torch_device), arguments), epsilon, image.note, arguments)
    print(json.dumps(report.model_dump(by_alias=True)) if arguments.json else "\n".join(map(printable, _lines(report))))


def _victim(model: Loaded, x: Tensor, arguments: AttackArguments) -> Victim:
    name = arguments.label
    if name is None:
        label = int(model(x[None]).argmax())
    elif name in model.classes:
        label = model.classes.index(name)
    else:
        raise UserError(f"unknown label '{name}': {nearest(name, list(model.classes))}")
    return Victim(model, fused(model.network), x, label, len(model.classes), bool(model.network.moe_layers()), arguments.seed)


def _report(model: Loaded, victim: Victim, epsilon: float, note: str, arguments: AttackArguments) -> Report:
    """Attack the image, and write the adversarial image if an attack fools the network."""
    image, label = str(arguments.image), model.classes[victim.label]
    report = Report(image=image, note=note, label=label, epsilon=epsilon, clean=_prediction(model, victim.x))

    def attempted(attack: str, radius: float, fooled: bool) -> None:
        report.tried.append(Attempt(attack=attack, epsilon=radius, fooled=fooled))
        if not arguments.json:
            print(f"{attack:18} at {_in_levels(radius)}: {'fooled' if fooled else 'withstood'}", file=sys.stderr)

    if victim.is_fooled(victim.x):
        return report
    first, withstood = first_to_fool(victim, epsilon, attempted, THOROUGH), 0.0
    if first is None:
        first, withstood = beyond(victim, epsilon, attempted)
    if first is None:
        return report
    minimal = smallest(victim, first, withstood, attempted)
    path, x_adv = _write(victim, minimal, first, epsilon, arguments.path)
    return Success(
        **dict(report), first=_change(first), smallest=_change(minimal), adversarial=_prediction(model, x_adv),
        file=str(path), file_epsilon=float((x_adv - victim.x).abs().max()), requested=str(arguments.path),
    )  # fmt: skip


def _change(fooled: Fooled) -> Change:
    return Change(attack=fooled.attack, epsilon=fooled.epsilon)


def _prediction(model: Loaded, x: Tensor) -> Prediction:
    """The prediction for one image [C, H, W]."""
    return Prediction(**model.predict_batch(x[None])[0]._asdict())


def _write(victim: Victim, minimal: Fooled, first: Fooled, epsilon: float, requested: Path) -> tuple[Path, Tensor]:
    """Write the image with the smallest change that fools. Returns the path and the image [C, H, W] in the file.

    A PNG is rounded inside the ball of `epsilon`; if the change is larger, inside the ball of its epsilon rounded up to a whole
    255th. If the rounded image does not fool, the first image that fooled is tried, and after that an .npy is written instead.
    """
    if requested.suffix.lower() == ".png":
        for fooled in (minimal, first):
            radius = epsilon if fooled.epsilon <= epsilon + SLACK else ceil(255 * (fooled.epsilon - SLACK)) / 255
            if (levels := in_eight_bits(victim, fooled, radius)) is not None:
                write_image(levels, requested)
                return requested, levels
        requested = requested.with_suffix(".npy")
    write_image(minimal.x_adv, requested)
    return requested, minimal.x_adv


def _lines(report: Report) -> Iterator[str]:
    note = f" ({report.note})" if report.note else ""
    yield f"{report.image}{note}: predicted {_words(report.clean)}"
    if report.clean.name != report.label:
        yield f"Its label is {report.label}: the network is wrong on it without any change, so no attack was tried."
    elif isinstance(report, Success):
        yield from _lines_of_success(report)
    else:
        yield "No attack that was tried fools the network, at any epsilon up to 1."


def _lines_of_success(report: Success) -> Iterator[str]:
    first, minimal, before = report.first, report.smallest, report.clean.pathway
    if first.epsilon > report.epsilon + SLACK:
        yield f"At epsilon {_in_levels(report.epsilon)} it withstood every attack that was tried."
    yield f"Fooled first by {first.attack}, at {_in_levels(first.epsilon)}"
    yield f"Smallest change that fooled it: {_in_levels(minimal.epsilon)}, by {minimal.attack} (others may need less)"
    if before:
        changed = sum(clean != attacked for clean, attacked in zip(before, report.adversarial.pathway, strict=True))
        yield f"Pathway: {changed} of {len(before)} choices changed"
    form = "8 bits a channel" if report.file.lower().endswith(".png") else "floats"
    rounded = "" if report.file == report.requested else f"; {report.requested} in 8 bits a channel would not fool it"
    yield f"Written: {report.file} ({form}, changed by {_in_levels(report.file_epsilon)}; read back, it fools the network{rounded})"
    yield f"The network takes it for {_words(report.adversarial)}"


def _words(prediction: Prediction) -> str:
    route = f", pathway {pathway(prediction.pathway)}" if prediction.pathway else ""
    return f"{prediction.name}, confidence {prediction.confidence:.4f}{route}"


def _in_levels(epsilon: float) -> str:
    return f"{255 * epsilon:.3g}/255"

"""`advmoe attack`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks import frozen
from advmoe.attacks.surrogate import route_of
from advmoe.cli.arguments.attack import AttackArguments
from advmoe.cli.device import device
from advmoe.cli.predict import pathway
from advmoe.config import RuntimeConfig
from advmoe.errors import UserError, nearest, printable
from advmoe.evaluation.fooling import THOROUGH, Fooled, Victim, beyond, first_to_fool, in_eight_bits, smallest, write_image
from advmoe.evaluation.shards import SLACK, true_network
from advmoe.models import fused
from advmoe.runs.load import load
from advmoe.runs.loaded import Loaded
from advmoe.runs.predict import read


def run(arguments: AttackArguments) -> None:
    place = device(RuntimeConfig(device=arguments.device, threads=arguments.threads))
    model = load(arguments.run, place)
    epsilon = model.threat_model.epsilon if arguments.epsilon is None else arguments.epsilon
    if epsilon <= 0:
        raise UserError(f"{arguments.run}: was trained for epsilon 0: give --epsilon")
    image = read(model, arguments.image)
    with frozen(model), true_network(model):
        victim = _victim(model, image.pixels.to(place), arguments)
        report = {"image": str(arguments.image), "note": image.note, **_report(model, victim, epsilon, arguments)}
    print(json.dumps(report) if arguments.json else "\n".join(map(printable, _lines(report))))


def _victim(model: Loaded, x: Tensor, arguments: AttackArguments) -> Victim:
    name = arguments.label
    if name is None:
        label = int(model(x[None]).argmax())
    elif name in model.classes:
        label = model.classes.index(name)
    else:
        raise UserError(f"unknown label '{name}': {nearest(name, list(model.classes))}")
    return Victim(model, fused(model.network), x, label, len(model.classes), bool(model.network.moe_layers()), arguments.seed)


def _report(model: Loaded, victim: Victim, epsilon: float, arguments: AttackArguments) -> dict[str, Any]:
    """JSON-ready: label, epsilon, the network's prediction for the clean image, and the result of each attack."""
    tried: list[dict[str, Any]] = []

    def told(attack: str, radius: float, fooled: bool) -> None:
        tried.append({"attack": attack, "epsilon": radius, "fooled": fooled})
        if not arguments.json:
            print(f"{attack:18} at {_shown(radius)}: {'fooled' if fooled else 'withstood'}", file=sys.stderr)

    report = {"label": model.classes[victim.label], "epsilon": epsilon, "clean": _seen(model, victim.x), "tried": tried}
    if victim.is_fooled(victim.x):
        return report
    found, withstood = first_to_fool(victim, epsilon, told, THOROUGH), 0.0
    if found is None:
        found, withstood = beyond(victim, epsilon, told)
    if found is None:
        return report
    least, path = smallest(victim, found, withstood, told), _write(victim, found, max(epsilon, found.epsilon), arguments.place)
    return report | {
        "first": _facts(found), "smallest": _facts(least), "adversarial": _seen(model, found.x_adv), "file": str(path),
        "asked": str(arguments.place),
    }  # fmt: skip


def _facts(found: Fooled) -> dict[str, Any]:
    return {"attack": found.attack, "epsilon": found.epsilon}


@torch.no_grad()
def _seen(model: Loaded, x: Tensor) -> dict[str, Any]:
    """Class, confidence and pathway of one image [C, H, W]."""
    logits, routings = model.forward_routed(x[None])
    confidence, number = logits.float().softmax(dim=1)[0].max(dim=0)
    route = route_of(routings)[0].tolist() if routings else []
    return {"class": model.classes[int(number)], "confidence": float(confidence), "pathway": route}


def _write(victim: Victim, found: Fooled, epsilon: float, place: Path) -> Path:
    """Write x' so that what is read back still fools: as a PNG where 8 bits suffice, else as an .npy beside it; the file's name."""
    levels = in_eight_bits(victim, found, epsilon) if place.suffix.lower() == ".png" else None
    path = place if levels is not None else place.with_suffix(".npy")
    write_image(found.x_adv if levels is None else levels, path)
    return path


def _lines(report: dict[str, Any]) -> Iterator[str]:
    clean, label = report["clean"], report["label"]
    note = f" ({report['note']})" if report["note"] else ""
    yield f"{report['image']}{note}: taken for {_answer(clean)}"
    if clean["class"] != label:
        yield f"It is a {label}: the network errs on it as it is, and nothing was tried."
    elif "first" not in report:
        yield "Nothing that was tried fools the network, at any epsilon up to 1."
    else:
        yield from _lines_of_success(report)


def _lines_of_success(report: dict[str, Any]) -> Iterator[str]:
    first, least, clean, adversarial = (report[name] for name in ("first", "smallest", "clean", "adversarial"))
    if first["epsilon"] > report["epsilon"] + SLACK:
        yield f"At epsilon {_shown(report['epsilon'])} it withstood everything that was tried."
    yield f"Fooled first by {first['attack']}, at {_shown(first['epsilon'])}: taken for {_answer(adversarial)}"
    yield f"Smallest change found that fools: {_shown(least['epsilon'])}, by {least['attack']} (others may need less)"
    if clean["pathway"]:
        moved = sum(before != after for before, after in zip(clean["pathway"], adversarial["pathway"], strict=True))
        yield f"Pathway: {moved} of {len(clean['pathway'])} choices changed"
    form = "8 bits a channel" if report["file"].lower().endswith(".png") else "floats"
    asked = "" if report["file"] == report["asked"] else f"; {report['asked']} in 8 bits a channel would not fool"
    yield f"Written: {report['file']} ({form}; read back, it fools the network{asked})"


def _answer(seen: dict[str, Any]) -> str:
    over = f", pathway {pathway(seen['pathway'])}" if seen["pathway"] else ""
    return f"{seen['class']}, confidence {seen['confidence']:.4f}{over}"


def _shown(epsilon: float) -> str:
    return f"{255 * epsilon:.3g}/255"

"""`advmoe export`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from advmoe.cli.arguments.export import ExportArguments
from advmoe.config import to_dict
from advmoe.data import Splits, load_dataset
from advmoe.data.images import balanced
from advmoe.errors import UserError
from advmoe.export import BATCHES, CALIBRATION, Agreement, Comparison, agreement, answers, check_dtype, compare, export
from advmoe.files import check_utf8
from advmoe.runs.load import load
from advmoe.runs.loaded import Loaded

NOISE = 64  # images compared where there are no real ones
SHOWN = 10  # rows named at most


def run(arguments: ExportArguments) -> None:
    check_utf8(arguments.out)
    if arguments.out.is_dir() or not arguments.out.absolute().parent.is_dir():
        raise UserError(f"{arguments.out}: --out takes a file in a folder that exists")
    check_dtype(arguments.format, arguments.dtype)
    loaded = load(arguments.run)
    if loaded.record is None:
        _warn(f"{arguments.run}: has no Record of its best epoch: what it withstands is not known")
    data = _data(arguments, loaded)
    calibration = _calibration(data) if arguments.dtype == "int8" and data is not None else None
    predict = export(
        loaded.network, loaded.input_size, arguments.out, arguments.format, facts(loaded) | {"dtype": arguments.dtype},
        arguments.dtype, calibration,
    )  # fmt: skip
    found: list[Comparison | Agreement] = []
    if arguments.check:
        pixels, labels = _images(data, loaded)
        known = answers(loaded.network, pixels)
        _warn_chance(arguments.run, known.logits, labels)
        exact = arguments.dtype == "float32"
        for batch in BATCHES:
            found.append(compare(known, predict, pixels, batch) if exact else agreement(known, predict, pixels, labels, batch))
    _tell(arguments, found)
    wrong = sorted({row for one in found if isinstance(one, Comparison) for row in one.differing})
    if wrong:
        raise UserError(f"{arguments.out}: not what PyTorch says of {len(wrong)} of {found[0].images} images: {_some(wrong)}")


def facts(loaded: Loaded) -> dict[str, object]:
    """What a file says of itself: classes, input, threat model, configuration, and what was measured."""
    config = to_dict(loaded.config.replace(data=loaded.config.data.replace(data_dir=None)))
    threat = {"norm": loaded.threat_model.norm, "epsilon": loaded.threat_model.epsilon}
    return {
        "classes": list(loaded.classes), "input_size": list(loaded.input_size), "threat_model": threat, "config": config,
        "epoch": loaded.epoch, "record": loaded.record and loaded.record.without_images().to_json(),
    }  # fmt: skip


def _data(arguments: ExportArguments, loaded: Loaded) -> Splits | None:
    """The run's data, if anything of it is needed; None if it is not available. Raises UserError if int8 needs it."""
    data, int8 = loaded.config.data, arguments.dtype == "int8"
    if not arguments.check and not int8:
        return None
    try:
        return load_dataset(data.replace(data_dir=arguments.data_dir or data.data_dir, limit_test=arguments.check or 1))
    except UserError as error:
        if int8:
            raise UserError(f"int8 is calibrated on training images, which are not to be had: {error}") from None
        _warn(f"compared on {NOISE} images of noise alone, for want of real ones: {error}")
        return None


def _calibration(data: Splits) -> Tensor:
    """Training images, balanced over the classes."""
    return data.train.subset(balanced(data.train.labels, CALIBRATION)).pixels()


def _images(data: Splits | None, loaded: Loaded) -> tuple[Tensor, Tensor | None]:
    """Test images, balanced over the classes, with their labels; without data noise, and none."""
    if data is None:
        return torch.rand(NOISE, *loaded.input_size, generator=torch.Generator().manual_seed(0)), None
    return data.test.pixels(), data.test.labels


def _warn_chance(run: str, logits: Tensor, labels: Tensor | None) -> None:
    """A network that is right no more often than a guess, but for two standard errors, is probably untrained."""
    if labels is None:
        return
    right, chance = (logits.argmax(dim=1) == labels).double().mean().item(), 1 / logits.shape[1]
    if right <= chance + 2 * (chance * (1 - chance) / len(labels)) ** 0.5:
        _warn(f"{run}: is right on {100 * right:.1f} % of {len(labels)} images, as guessing would be: it looks untrained")


def _tell(arguments: ExportArguments, found: Sequence[Comparison | Agreement]) -> None:
    if arguments.json:
        told = [{**asdict(one), **({"equal": one.equal} if isinstance(one, Comparison) else {})} for one in found]
        named = {"file": str(arguments.out), "format": arguments.format, "dtype": arguments.dtype}
        print(json.dumps({**named, "compared": told}))
        return
    kind = arguments.format if arguments.dtype == "float32" else f"{arguments.format}, {arguments.dtype}"
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB, {kind}")
    for one in found:
        print(f"batch {one.batch:2}, {one.images} images: {_verdict(one)}")
    undecided = found[0].undecided if found and isinstance(found[0], Comparison) else ()
    if undecided:
        count = f"{len(undecided)} images with a router margin under 1e-5"
        print(f"left out, as rounding decides their route: {count}: {_some(undecided)}")


def _verdict(found: Comparison | Agreement) -> str:
    if isinstance(found, Comparison):
        same = "the same classes and routes as PyTorch" if found.equal else f"{len(found.differing)} DIFFER"
        return f"{same}, logits within {found.largest:.1e}"
    routes = "" if found.routes is None else f", {found.routes:.1f} % by the same route"
    accuracy = "" if found.accuracy is None else f"; accuracy {found.accuracy:+.1f} points"
    return f"{found.classes:.1f} % in the same class as PyTorch in float32{routes}{accuracy}"


def _some(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:SHOWN])) + (", ..." if len(rows) > SHOWN else "")


def _warn(text: str) -> None:
    print(f"warning: {' '.join(text.split())}", file=sys.stderr)

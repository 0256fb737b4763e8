"""`advmoe export`."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from advmoe.attacks.surrogate import UNDECIDED
from advmoe.cli.arguments.export import ExportArguments
from advmoe.config import to_dict
from advmoe.config.choices import Dtype
from advmoe.data import Splits, load_dataset
from advmoe.errors import UserError
from advmoe.export import (
    BATCHES,
    Agreement,
    Comparison,
    Encoding,
    agreement,
    calibration_images,
    compare,
    export,
    format_of,
    outputs,
)
from advmoe.files import check_target, check_utf8
from advmoe.runs.load import load, portable, shared
from advmoe.runs.loaded import Loaded
from advmoe.wording import number_of

logger = logging.getLogger("advmoe")
NOISE = 64  # number of random images to compare if there are no real ones
MAX_ROWS = 10  # in a message


def run(arguments: ExportArguments) -> None:
    check_utf8(arguments.out)
    check_target(arguments.out, "the exported file", Path(arguments.run))
    encoding = Encoding(arguments.format or format_of(arguments.out), arguments.dtype)
    loaded = load(arguments.run)
    if loaded.record is None:
        logger.warning("%s: has no Record of its best epoch, so its robust accuracy is unknown", arguments.run)
    elif arguments.dtype != "float32":
        out, dtype = arguments.out, arguments.dtype
        logger.warning("%s: written without the Record, which is of the network in float32, not in %s", out, dtype)
    data = _data(arguments, loaded)
    calibration = calibration_images(data) if arguments.dtype == "int8" and data is not None else None
    predict = export(
        loaded.network, loaded.input_size, arguments.out,
        encoding=encoding, facts=facts(loaded, encoding.dtype), calibration=calibration,
    )  # fmt: skip
    comparisons: list[Comparison | Agreement] = []
    if arguments.check:
        pixels, labels = _images(data, loaded)
        reference = outputs(loaded.network, pixels)
        _warn_chance(arguments.run, reference.logits, labels)
        exact = arguments.dtype == "float32"
        for batch in BATCHES:
            comparisons.append(
                compare(reference, predict, pixels, batch) if exact else agreement(reference, predict, pixels, labels, batch)
            )
    _print(arguments, encoding, comparisons)
    if any(isinstance(item, Comparison) and not item.compared for item in comparisons):
        raise UserError(f"{arguments.out}: was not compared with PyTorch: rounding decides the route of every image")
    differing = sorted({row for item in comparisons if isinstance(item, Comparison) for row in item.differing})
    if differing:
        raise UserError(
            f"{arguments.out}: differs from PyTorch on {len(differing)} of {comparisons[0].images} images: {_first_rows(differing)}"
        )


def facts(loaded: Loaded, dtype: Dtype) -> dict[str, object]:
    """The metadata of a file: classes, input, threat model, configuration, dtype of the convolutions, and the Record. The Record is
    None for other dtypes than float32, in which the network was evaluated."""
    threat = {"norm": loaded.threat_model.norm, "epsilon": loaded.threat_model.epsilon}
    record = loaded.record if dtype == "float32" else None
    return {
        "classes": list(loaded.classes), "input_size": list(loaded.input_size), "threat_model": threat,
        "config": to_dict(portable(loaded.config)), "epoch": loaded.epoch, "dtype": dtype,
        "record": record and shared(record, images=False).to_json(),
    }  # fmt: skip


def _data(arguments: ExportArguments, loaded: Loaded) -> Splits | None:
    """The run's data; None if none is needed, or if it cannot be read. Raises UserError if int8 needs it and it cannot be read."""
    data, int8 = loaded.config.data, arguments.dtype == "int8"
    if not arguments.check and not int8:
        return None
    try:
        return load_dataset(data.replace(data_dir=arguments.data_dir or data.data_dir, limit_test=arguments.check or 1))
    except UserError as error:
        if int8:
            raise UserError(f"int8 is calibrated on training images, which cannot be read: {error}") from None
        logger.warning("compared on %d images of noise, because the test images cannot be read: %s", NOISE, error)
        return None


def _images(data: Splits | None, loaded: Loaded) -> tuple[Tensor, Tensor | None]:
    """Test images, balanced over the classes, with their labels. Without data: noise, and no labels."""
    if data is None:
        return torch.rand(NOISE, *loaded.input_size, generator=torch.Generator().manual_seed(0)), None
    return data.test.pixels(), data.test.labels


def _warn_chance(run: str, logits: Tensor, labels: Tensor | None) -> None:
    """Warn if the accuracy is at most two standard errors above that of a guess: the network is probably untrained."""
    if labels is None:
        return
    accuracy, chance = (logits.argmax(dim=1) == labels).double().mean().item(), 1 / logits.shape[1]
    if accuracy <= chance + 2 * (chance * (1 - chance) / len(labels)) ** 0.5:
        logger.warning(
            "%s: is right on %.1f %% of %d images, no more than a guess: it looks untrained", run, 100 * accuracy, len(labels)
        )


def _print(arguments: ExportArguments, encoding: Encoding, comparisons: Sequence[Comparison | Agreement]) -> None:
    if arguments.json:
        comparisons_json = [
            {**asdict(item), **({"equal": item.equal} if isinstance(item, Comparison) else {})} for item in comparisons
        ]
        header = {"file": str(arguments.out), "format": encoding.format, "dtype": encoding.dtype}
        print(json.dumps({**header, "compared": comparisons_json}))
        return
    form = encoding.format if encoding.dtype == "float32" else f"{encoding.format}, {encoding.dtype}"
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB, {form}")
    for item in comparisons:
        print(f"batch {item.batch:2}, {item.images} images: {_verdict(item)}")
    undecided = comparisons[0].undecided if comparisons and isinstance(comparisons[0], Comparison) else ()
    if undecided:
        count = f"{number_of(len(undecided), 'image')} with a router margin under {UNDECIDED:g}"
        print(f"not compared, because rounding decides their route: {count}: {_first_rows(undecided)}")


def _verdict(comparison: Comparison | Agreement) -> str:
    if isinstance(comparison, Comparison):
        if not comparison.compared:
            return "NONE COMPARED"
        same = "the same classes and routes as PyTorch" if comparison.equal else f"{len(comparison.differing)} DIFFER"
        return f"{same}, logits within {comparison.largest:.1e}"
    routes = "" if comparison.routes is None else f", {comparison.routes:.1f} % by the same route"
    accuracy = "" if comparison.accuracy is None else f"; accuracy {comparison.accuracy:+.1f} points"
    return f"{comparison.classes:.1f} % in the same class as PyTorch in float32{routes}{accuracy}"


def _first_rows(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:MAX_ROWS])) + (", ..." if len(rows) > MAX_ROWS else "")

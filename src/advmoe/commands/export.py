"""`advmoe export`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from advmoe.artifact import Loaded, load
from advmoe.commands.parsing import Flag, parse
from advmoe.config import to_dict
from advmoe.data import load_dataset
from advmoe.errors import UserError
from advmoe.export import BATCHES, Comparison, answers, compare, export

NOISE = 64  # pictures compared where there are no real ones
SHOWN = 10  # rows named at most


@dataclass(frozen=True)
class ExportArguments:
    """Write a trained network as one file for other programs, and compare it with PyTorch.

    The file takes pixels in [0, 1], [batch, C, H, W], and gives logits and routes; normalisation and routers are part of it.
    """

    run: tyro.conf.Positional[str]
    """A run's folder, a file of a network, or a name on the hub."""
    out: Path
    """The file to write."""
    format: Literal["onnx", "torch-export"] = "onnx"
    """ONNX, or torch.export's own format (.pt2)."""
    check: int = 1000
    """Compare with PyTorch on this many test pictures, at batch 1, 7 and 64; 0 leaves it out."""
    data_dir: str | None = None
    """Where the data lies now, if not where it was trained on."""
    json: Flag = False
    """Print what was found as JSON."""

    def __post_init__(self) -> None:
        if self.check < 0:
            raise UserError(f"check must be at least 0, not {self.check}")


def run(words: list[str]) -> None:
    arguments = parse(ExportArguments, "export", words)
    if arguments.out.is_dir() or not arguments.out.absolute().parent.is_dir():
        raise UserError(f"{arguments.out}: --out takes a file in a folder that exists")
    loaded = load(arguments.run)
    if loaded.record is None:
        _warn(f"{arguments.run}: has no Record of its best epoch: what it withstands is not known")
    predict = export(loaded.network, loaded.input_size, arguments.out, arguments.format, facts(loaded))
    found: list[Comparison] = []
    if arguments.check:
        pixels, labels = _pictures(arguments, loaded)
        known = answers(loaded.network, pixels)
        _warn_chance(arguments.run, known.logits, labels)
        found = [compare(known, predict, pixels, batch) for batch in BATCHES]
    _tell(arguments, found)
    wrong = sorted({row for one in found for row in one.differing})
    if wrong:
        raise UserError(f"{arguments.out}: not what PyTorch says of {len(wrong)} of {found[0].pictures} pictures: {_some(wrong)}")


def facts(loaded: Loaded) -> dict[str, Any]:
    """What a file says of itself: classes, input, threat model, configuration, and what was measured."""
    config = to_dict(replace(loaded.config, data=replace(loaded.config.data, data_dir=None)))
    threat = {"norm": loaded.threat_model.norm, "epsilon": loaded.threat_model.epsilon}
    return {
        "classes": list(loaded.classes), "input_size": list(loaded.input_size), "threat_model": threat, "config": config,
        "epoch": loaded.epoch, "record": loaded.record,
    }  # fmt: skip


def _pictures(arguments: ExportArguments, loaded: Loaded) -> tuple[Tensor, Tensor | None]:
    """Test pictures, balanced over the classes, with their labels; where the data is not to be had, noise and none."""
    data = loaded.config.data
    try:
        test = load_dataset(replace(data, data_dir=arguments.data_dir or data.data_dir, limit_test=arguments.check)).test
    except UserError as error:
        _warn(f"compared on {NOISE} pictures of noise alone, for want of real ones: {error}")
        return torch.rand(NOISE, *loaded.input_size, generator=torch.Generator().manual_seed(0)), None
    return test.pixels(), test.labels


def _warn_chance(run: str, logits: Tensor, labels: Tensor | None) -> None:
    """A network that is right no more often than a guess, but for two standard errors, is probably untrained."""
    if labels is None:
        return
    right, chance = (logits.argmax(dim=1) == labels).double().mean().item(), 1 / logits.shape[1]
    if right <= chance + 2 * (chance * (1 - chance) / len(labels)) ** 0.5:
        _warn(f"{run}: is right on {100 * right:.1f} % of {len(labels)} pictures, as guessing would be: it looks untrained")


def _tell(arguments: ExportArguments, found: Sequence[Comparison]) -> None:
    if arguments.json:
        told = [{**asdict(one), "equal": one.equal} for one in found]
        print(json.dumps({"file": str(arguments.out), "format": arguments.format, "compared": told}))
        return
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB, {arguments.format}")
    for one in found:
        verdict = "the same classes and routes as PyTorch" if one.equal else f"{len(one.differing)} DIFFER"
        print(f"batch {one.batch:2}, {one.pictures} pictures: {verdict}, logits within {one.largest:.1e}")
    if found and found[0].undecided:
        rows = found[0].undecided
        print(f"left out, as rounding decides their route: {len(rows)} pictures with a router margin under 1e-5: {_some(rows)}")


def _some(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:SHOWN])) + (", ..." if len(rows) > SHOWN else "")


def _warn(text: str) -> None:
    print(f"warning: {' '.join(text.split())}", file=sys.stderr)

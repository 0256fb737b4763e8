"""`advmoe data get` and `advmoe data check`."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from advmoe.cli.parsing import parse
from advmoe.config import DataConfig
from advmoe.data import Splits, load_dataset
from advmoe.data.fetch import fetch
from advmoe.data.hub import fetch_from_hub
from advmoe.data.images import Source
from advmoe.errors import lookup


@dataclass(frozen=True)
class DataGetArguments:
    """Fetch cifar10, cifar100 or tinyimagenet, go on with a broken download, and verify what came."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of the data set."""
    to: Path | None = None
    """Folder to put it in; by default data/NAME."""
    source: Annotated[Literal["official", "hub"], tyro.conf.arg(name="from")] = "official"
    """The official address, or the Hugging Face hub (needs pip install 'advmoe[hub]')."""


@dataclass(frozen=True)
class DataCheckArguments:
    """Read a data set as a run would, and print what it holds and its fingerprint."""

    data: DataConfig = field(default_factory=DataConfig)
    json: bool = False
    """Print one JSON object instead of lines."""


def get(arguments: DataGetArguments) -> None:
    """Fetch a data set and say where it lies. Raises UserError where it cannot be had."""
    name = arguments.name
    to = arguments.to or Path("data") / name
    lines = fetch_from_hub(name, to) if arguments.source == "hub" else fetch(name, to, Console(stderr=True))
    print(*lines, f"next: advmoe data check --dataset {name} --data-dir {to}", sep="\n")


def check(arguments: DataCheckArguments) -> None:
    """Read a data set and print its summary. Raises UserError where something is missing or damaged."""
    held = summary(load_dataset(arguments.data))
    if arguments.json:
        print(json.dumps(held))
        return
    print(f"name         {held['name']}")
    print(f"fingerprint  {held['fingerprint']}")
    print(f"images     {' x '.join(map(str, held['shape']))}, {held['classes']} classes")
    for name, part in held["parts"].items():
        least, most = part["least_a_class"], part["most_a_class"]
        print(f"{name:12} {part['images']:,}, {least:,}{f' to {most:,}' if most > least else ''} a class")


def summary(splits: Splits) -> dict[str, Any]:
    """What a data set holds: name, fingerprint, shape (C, H, W), number of classes, and each part's counts."""
    classes = len(splits.spec.classes)
    parts = {"train": splits.train, "validation": splits.val, "test": splits.test}
    return {
        "name": splits.name, "fingerprint": splits.fingerprint, "shape": list(splits.spec.shape), "classes": classes,
        "parts": {name: _counts(part, classes) for name, part in parts.items()},
    }  # fmt: skip


def _counts(part: Source, classes: int) -> dict[str, int]:
    counts = torch.bincount(part.labels, minlength=classes)
    return {"images": len(part), "least_a_class": int(counts.min()), "most_a_class": int(counts.max())}


def run(words: list[str]) -> None:
    """Fetch a data set (get), or read one and say what it holds (check)."""
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return
    kind, run = lookup(COMMANDS, words[0], "data command")
    run(parse(kind, f"data {words[0]}", words[1:]))


def _overview() -> str:
    lines = [f"  {name:9} {kind.__doc__}" for name, (kind, _) in COMMANDS.items()]
    return "\n".join(["usage: advmoe data COMMAND ...    (advmoe data COMMAND --help tells more)", "", *lines])


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "get": (DataGetArguments, get),
    "check": (DataCheckArguments, check),
}

"""`advmoe data get` and `advmoe data check`."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from pydantic import BaseModel
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
    """Download cifar10, cifar100 or tinyimagenet, resume an interrupted download, and verify the files."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of the data set."""
    to: Path | None = None
    """Folder to download to; by default data/NAME."""
    source: Annotated[Literal["official", "hub"], tyro.conf.arg(name="from")] = "official"
    """The official address, or the Hugging Face hub (needs pip install 'advmoe[hub]')."""


@dataclass(frozen=True)
class DataCheckArguments:
    """Read a data set as training would, and print its splits and its fingerprint."""

    data: DataConfig = field(default_factory=DataConfig)
    json: bool = False
    """Print one JSON object instead of text."""


def get(arguments: DataGetArguments) -> None:
    """Download a data set and print where it is. Raises UserError if it is not available."""
    name = arguments.name
    to = arguments.to or Path("data") / name
    lines = fetch_from_hub(name, to) if arguments.source == "hub" else fetch(name, to, Console(stderr=True))
    print(*lines, f"next: advmoe data check --dataset {name} --data-dir {shlex.quote(str(to))}", sep="\n")


def check(arguments: DataCheckArguments) -> None:
    """Read a data set and print its summary. Raises UserError if something is missing or damaged."""
    content = summary(load_dataset(arguments.data))
    if arguments.json:
        print(content.model_dump_json())
        return
    print(f"name         {content.name}")
    print(f"fingerprint  {content.fingerprint}")
    print(f"images       {' x '.join(map(str, content.shape))}, {content.classes} classes")
    for name, counts in content.parts.items():
        least, most = counts.least_a_class, counts.most_a_class
        print(f"{name:12} {counts.images:,}, {least:,}{f' to {most:,}' if most > least else ''} a class")


class Counts(BaseModel):
    """The number of images in a split, and the fewest and most of one class."""

    images: int
    least_a_class: int
    most_a_class: int


class Summary(BaseModel):
    """What a data set contains; `shape` is (C, H, W), `classes` their number, `parts` the counts of each split."""

    name: str
    fingerprint: str
    shape: tuple[int, int, int]
    classes: int
    parts: dict[str, Counts]


def summary(splits: Splits) -> Summary:
    """The summary of a data set."""
    classes = len(splits.spec.classes)
    parts = {"train": splits.train, "validation": splits.val, "test": splits.test}
    return Summary(
        name=splits.name, fingerprint=splits.fingerprint, shape=splits.spec.shape, classes=classes,
        parts={name: _counts(images, classes) for name, images in parts.items()},
    )  # fmt: skip


def _counts(images: Source, classes: int) -> Counts:
    counts = torch.bincount(images.labels, minlength=classes)
    return Counts(images=len(images), least_a_class=int(counts.min()), most_a_class=int(counts.max()))


def run(words: list[str]) -> None:
    """Download a data set (get), or read one and print what it contains (check)."""
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

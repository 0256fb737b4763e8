"""`advmoe data get` and `advmoe data check`."""

import shlex
from pathlib import Path

import torch
from pydantic import BaseModel
from rich.console import Console

from advmoe.cli.arguments.data import DataCheckArguments, DataGetArguments
from advmoe.data import Splits, load_dataset
from advmoe.data.fetch import fetch
from advmoe.data.hub import fetch_from_hub
from advmoe.data.images import Source
from advmoe.errors import UserError


def run(arguments: DataGetArguments | DataCheckArguments) -> None:
    """Download a data set (get), or read one and print what it contains (check)."""
    if isinstance(arguments, DataGetArguments):
        get(arguments)
    else:
        check(arguments)


def get(arguments: DataGetArguments) -> None:
    """Download a data set and print where it is. Raises UserError if it is not available."""
    name = arguments.name
    to = arguments.to or Path("data") / name
    if to.exists() and not to.is_dir():
        raise UserError(f"{to}: is a file; --to takes a folder")
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


class PartSummary(BaseModel):
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
    parts: dict[str, PartSummary]


def summary(splits: Splits) -> Summary:
    """The summary of a data set."""
    classes = len(splits.spec.classes)
    parts = {"train": splits.train, "validation": splits.val, "test": splits.test}
    return Summary(
        name=splits.name, fingerprint=splits.fingerprint, shape=splits.spec.shape, classes=classes,
        parts={name: _counts(images, classes) for name, images in parts.items()},
    )  # fmt: skip


def _counts(images: Source, classes: int) -> PartSummary:
    counts = torch.bincount(images.labels, minlength=classes)
    return PartSummary(images=len(images), least_a_class=int(counts.min()), most_a_class=int(counts.max()))

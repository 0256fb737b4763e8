"""Predicts classes, confidences and pathways for files and folders of images, one batch at a time."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from advmoe.data import cores
from advmoe.data.single import LoadedImage
from advmoe.errors import UserError
from advmoe.runs.loaded import Loaded


class FilePrediction(NamedTuple):
    """`confidence` is the softmax probability of the class `name`; `pathway` the expert of each MoE layer, () without experts."""

    image: Path
    name: str
    confidence: float
    pathway: tuple[int, ...]
    note: str


class Unreadable(NamedTuple):
    """A file that contains no image, or a folder that cannot be read; `reason` is a line that names it."""

    image: Path
    reason: str


def images_in(paths: Iterable[Path]) -> Iterator[Path | Unreadable]:
    """The files among `paths`, and all files in the folders among them, at any depth; hidden files in folders are ignored.

    Links are followed; a link to a folder that contains it is reported as Unreadable, and so is a folder that cannot be read.
    The file names of one folder at each depth are in memory at a time, and no more.
    """
    for path in paths:
        if os.path.isdir(path):
            yield from _files_below(path, ())
        else:
            yield path


def _files_below(folder: Path, parents: tuple[Path, ...]) -> Iterator[Path | Unreadable]:
    """`parents` are the resolved paths of the folders that are being read."""
    try:
        resolved = folder.resolve()
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, in Python 3.11 and 3.12
        yield Unreadable(folder, str(UserError(f"{folder}: cannot be read ({getattr(error, 'strerror', None) or error})")))
        return
    if resolved in parents:
        yield Unreadable(folder, str(UserError(f"{folder}: a link to a folder that contains it ({resolved}); not followed")))
        return
    for path in (folder / name for name in names):
        if os.path.isdir(path):  # unlike path.is_dir(), False if the folder may be listed, but not entered
            yield from _files_below(path, (*parents, resolved))
        else:
            yield path


def predict(model: Loaded, paths: Iterable[Path | Unreadable], batch_size: int) -> Iterator[FilePrediction | Unreadable]:
    """One answer for each of `paths`, in order; an Unreadable among them is its own answer. At most `batch_size` images are in
    memory."""
    remaining = iter(paths)
    with ThreadPoolExecutor(cores()) as pool:
        while chunk := list(islice(remaining, batch_size)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, on odd metadata
                images = list(pool.map(lambda path: _read_or_reason(model, path), chunk))
            yield from _classify(model, images)


def _read_or_reason(model: Loaded, path: Path | Unreadable) -> tuple[Path, LoadedImage] | Unreadable:
    if isinstance(path, Unreadable):
        return path
    try:
        return path, model.read(path)
    except UserError as error:
        return Unreadable(path, str(error))


def _classify(model: Loaded, chunk: Sequence[tuple[Path, LoadedImage] | Unreadable]) -> Iterator[FilePrediction | Unreadable]:
    """The predictions for the images in `chunk`; the others pass unchanged."""
    pixels = [entry[1].pixels for entry in chunk if not isinstance(entry, Unreadable)]
    device = next(model.parameters()).device
    predictions = iter(model.predict_batch(torch.stack(pixels).to(device)) if pixels else ())
    for entry in chunk:
        yield entry if isinstance(entry, Unreadable) else FilePrediction(entry[0], *next(predictions), entry[1].note)

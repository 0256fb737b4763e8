"""Files and folders of images to classes, confidences and pathways, a batch at a time."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from advmoe.attacks.surrogate import route_of
from advmoe.data import cores
from advmoe.data.single import LoadedImage, read_image
from advmoe.errors import UserError
from advmoe.runs.load import Loaded

STREAMED = "imagenet"  # whose evaluation crops its images, so that they are cropped likewise here


class Prediction(NamedTuple):
    """`confidence` is the softmax probability of class `name`; `pathway` the expert chosen in each layer, () without experts."""

    image: Path
    name: str
    confidence: float
    pathway: tuple[int, ...]
    note: str


class Unreadable(NamedTuple):
    """A file that holds no image, and why, in a line that names it."""

    image: Path
    reason: str


def images_in(places: Iterable[Path]) -> Iterator[Path]:
    """The files among `places`, and those in the folders among them at any depth; hidden ones, found there, are passed over.

    A folder's names are held at a time, sorted, and nothing else of it.
    """
    for place in places:
        if place.is_dir():
            yield from _below(place)
        else:
            yield place


def _below(folder: Path) -> Iterator[Path]:
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        yield folder  # which reading it names as no plain file
        return
    for path in (folder / name for name in names):
        if path.is_dir() and not path.is_symlink():  # a link may lead back to where it lies
            yield from _below(path)
        else:
            yield path


def read(model: Loaded, path: Path) -> LoadedImage:
    """The image in a file as `model` takes it. Raises UserError where there is none."""
    return read_image(path, model.input_size, central=model.config.data.dataset == STREAMED)


def predict(model: Loaded, paths: Iterable[Path], batch_size: int) -> Iterator[Prediction | Unreadable]:
    """One answer for each of `paths`, in order. No more than `batch_size` images are in memory."""
    rest = iter(paths)
    with ThreadPoolExecutor(cores()) as pool:
        while chunk := list(islice(rest, batch_size)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, on odd metadata
                found = list(pool.map(lambda path: _try(model, path), chunk))
            yield from _classified(model, chunk, found)


def _try(model: Loaded, path: Path) -> LoadedImage | Unreadable:
    try:
        return read(model, path)
    except UserError as error:
        return Unreadable(path, str(error))


def _classified(
    model: Loaded, paths: Sequence[Path], found: Sequence[LoadedImage | Unreadable]
) -> Iterator[Prediction | Unreadable]:
    """What the network makes of the images among `found`, which were read from `paths`."""
    images = [image for image in found if isinstance(image, LoadedImage)]
    answers = iter(_answers(model, images) if images else ())
    for path, image in zip(paths, found, strict=True):
        yield Prediction(path, *next(answers), image.note) if isinstance(image, LoadedImage) else image


@torch.inference_mode()
def _answers(model: Loaded, images: Sequence[LoadedImage]) -> list[tuple[str, float, tuple[int, ...]]]:
    """Class, confidence and pathway of each of one or more images."""
    x = torch.stack([image.pixels for image in images]).to(next(model.parameters()).device)
    logits, routings = model.forward_routed(x)
    confidences, classes = logits.float().softmax(dim=1).max(dim=1)
    routes = route_of(routings).tolist() if routings else [[] for _ in images]
    rows = zip(classes.tolist(), confidences.tolist(), routes, strict=True)
    return [(model.classes[number], confidence, tuple(route)) for number, confidence, route in rows]

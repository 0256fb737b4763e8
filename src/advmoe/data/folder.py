"""A user's own images: a folder for each class, with or without parts."""

from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from advmoe.config import DataConfig
from advmoe.data.decode import decode_all, decode_fitted, size_of
from advmoe.data.images import Images, ImageSpec, Splits, divided, fingerprint, from_arrays, hold_out, in_content_order, limit
from advmoe.data.place import place_of, readable, visible
from advmoe.errors import UserError

FORMS = "train/CLASS/, test/CLASS/ and, if there is one, val/CLASS/, or just CLASS/, with images in them"
PARTS = ("train", "val", "test")
TEST_SHARE = 0.2  # of each class, where the folder has no parts
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))

Files = dict[str, list[Path]]  # class name -> its images, both sorted


def spec(config: DataConfig) -> ImageSpec:
    """What `load` finds in the folder: it reads it."""
    return load(config).spec


def load(config: DataConfig) -> Splits:
    """The images of `data_dir`, in RGB, brought to `image_size` (by default all must have the size of the first).

    In parts DIR/train/CLASS/*, DIR/test/CLASS/* and, optionally, DIR/val/CLASS/*; or plain as DIR/CLASS/*, where a stratified
    20 % are held out as the test part, the same ones whatever the run's seed. Without a val part, `validation_share` of the
    training part is held out for it. Classes are sorted by name; hidden files are passed over, links are followed.
    Mean and deviation are those of the training images, the held-out ones for validation included.
    Raises UserError, with the path, where an image is in no class, cannot be read, or a class has too few.
    """
    with readable(config):
        place = place_of(config, FORMS)
        found = _find(place)
        _check(place, found)
        size = config.image_size or _first_size(found)
        parts = {name: _read(files, size, config.image_size is not None) for name, files in found.items()}
    if "test" not in parts:
        parts["train"], parts["test"] = hold_out(parts["train"], TEST_SHARE)
    train, test = parts["train"], parts["test"]
    image_spec = ImageSpec(tuple(found["train"]), (3, size, size), *channel_statistics(train.raw))
    if "val" not in parts:
        return divided("folder", image_spec, train, test, config)
    data = fingerprint(train, parts["val"], test)
    rest, reported = limit(train, config.limit_train), limit(test, config.limit_test)
    return Splits("folder", image_spec, data, rest, parts["val"], reported)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel of [n, C, H, W] uint8 images in [0, 1], to four decimals; the std at least 0.01."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    weights = counts / counts.sum(1, keepdim=True)
    means = weights @ values
    stds = (weights * (values - means[:, None]) ** 2).sum(1).sqrt()
    return tuple(round(mean, 4) for mean in means.tolist()), tuple(max(round(std, 4), 0.01) for std in stds.tolist())


# What lies where


def _find(place: Path) -> dict[str, Files]:
    """The files of each part; of a folder without parts all are under train."""
    if not place.is_dir():
        raise UserError(f"{place}: not a folder; folder needs one that holds {FORMS}")
    if not _has_parts(place):
        return {"train": _classes(place)}
    for folder in visible(place):
        if folder.is_dir() and folder.name not in PARTS:
            raise UserError(f"{folder}: no part of a data set; beside train and test there may be val")
    for name in ("train", "test"):
        if not (place / name).is_dir():
            raise UserError(f"{place / name}: no such folder; {place} needs {FORMS}")
    return {name: _classes(place / name) for name in PARTS if (place / name).is_dir()}


def _has_parts(place: Path) -> bool:
    """Whether train and test are parts; alone and with images in it, either may also be a class."""
    train, test = place / "train", place / "test"
    if train.is_dir() and test.is_dir():
        return True
    return any(path.is_dir() for folder in (train, test) if folder.is_dir() for path in visible(folder))


def _classes(folder: Path) -> Files:
    entries = visible(folder)
    for path in entries:
        if not path.is_dir() and path.suffix.lower() in SUFFIXES:
            raise UserError(f"{path}: lies outside of the class folders")
    return {path.name: _images(path) for path in entries if path.is_dir()}


def _images(folder: Path) -> list[Path]:
    paths = visible(folder)
    if not paths:
        raise UserError(f"{folder}: holds no image")
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: not a plain file; the folder of a class holds its images and nothing else")
    return paths


def _check(place: Path, found: dict[str, Files]) -> None:
    """Raises UserError where parts differ in their classes, or a class is too small to be divided."""
    train = found["train"]
    if len(train) < 2:
        raise UserError(f"{place}: needs the folders of 2 classes or more, has {', '.join(train) or 'none'}; give {FORMS}")
    for name, files in found.items():
        odd = sorted(files.keys() ^ train.keys())
        if odd:
            here, there = ("train", name) if odd[0] in train else (name, "train")
            raise UserError(f"{place / here / odd[0]}: class {odd[0]} is in {here}, but not in {there}")
    needed = 1 + ("val" not in found) + ("test" not in found)
    for name, paths in train.items():
        if len(paths) < needed:
            raise UserError(f"{paths[0].parent}: class {name} has {len(paths)} training image(s), {needed} are the least")


# Images


def _first_size(found: dict[str, Files]) -> int:
    path = next(iter(found["train"].values()))[0]
    width, height = size_of(path.read_bytes(), str(path))
    if width != height:
        raise UserError(f"{path}: the image is {width} x {height}, not square: give --image-size")
    return width


def _read(files: Files, size: int, resize: bool) -> Images:
    paths = list(chain.from_iterable(files.values()))
    labels = [label for label, found in enumerate(files.values()) for _ in found]
    images = decode_all(len(paths), size, lambda row: _image(paths[row], size, resize))
    return in_content_order(from_arrays(images, labels, len(files), str(paths[0].parent.parent)))


def _image(path: Path, size: int, resize: bool) -> np.ndarray:
    data = path.read_bytes()
    found = (size, size) if resize else size_of(data, str(path))
    if found != (size, size):
        raise UserError(f"{path}: the image is {found[0]} x {found[1]}, the first one {size} x {size}: give --image-size")
    return decode_fitted(data, size, str(path))

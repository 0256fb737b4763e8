"""A user's own images: one folder for each class, with or without folders for the splits."""

from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from advmoe.config import DataConfig
from advmoe.data.decode import decode_all, decode_fitted, stored_size
from advmoe.data.images import (
    Counts,
    Images,
    ImageSpec,
    Splits,
    SplitSource,
    count_splits,
    fingerprint,
    from_arrays,
    hold_out,
    in_content_order,
    limit,
    make_splits,
    only_labels,
)
from advmoe.data.paths import class_folders, data_path, os_errors_as_user_errors, visible_entries
from advmoe.errors import UserError

FORMS = "train/CLASS/, test/CLASS/ and, if there is one, val/CLASS/, or just CLASS/, with images in them"
SPLITS = ("train", "val", "test")
TEST_SHARE = 0.2  # of each class, if the folder has no splits
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))

Files = dict[str, list[Path]]  # class name -> its images, both sorted


def spec(config: DataConfig) -> ImageSpec:
    """The spec of the images in the folder, which are read for it."""
    return load(config).spec


def load(config: DataConfig) -> Splits:
    """The images in `data_dir`, in RGB, resized to `image_size` (by default all must have the size of the first image).

    They are in DIR/train/CLASS/*, DIR/test/CLASS/* and, optionally, DIR/val/CLASS/*; or in DIR/CLASS/*, of which a stratified
    20 % are held out as the test split, the same images in every run. Without a val folder, `validation_share` of the training
    images is held out for validation. Classes are sorted by name; hidden files are ignored, links are followed. Mean and
    std are those of the training images, including the ones held out for validation.
    Raises UserError, with the path, if an image is in no class, cannot be read, or a class has too few images.
    """
    with os_errors_as_user_errors(config.data_dir):
        files = _listed(config)
        size = config.image_size or _first_size(files)
        splits = {name: _read(files[name], size, config.image_size is not None) for name in files}
    train, test = _train_and_test(splits)
    image_spec = ImageSpec(tuple(files["train"]), (3, size, size), *channel_statistics(train.raw))
    if "val" not in splits:
        return make_splits("folder", image_spec, train, test, config)
    data = fingerprint(train, splits["val"], test)
    return Splits("folder", image_spec, data, limit(train, config.limit_train), splits["val"], limit(test, config.limit_test))


def count(config: DataConfig) -> Counts:
    """The number of images in each split. Raises UserError as `load`, but not for images that cannot be read."""
    with os_errors_as_user_errors(config.data_dir):
        files = _listed(config)
    splits = {name: only_labels(_labels(classes), len(classes), name) for name, classes in files.items()}
    train, test = _train_and_test(splits)
    if "val" not in splits:
        return count_splits(train, test, len(files["train"]), config)
    return Counts(len(limit(train, config.limit_train)), len(splits["val"]), len(limit(test, config.limit_test)))


def _train_and_test(splits: dict[str, SplitSource]) -> tuple[SplitSource, SplitSource]:
    """The two splits; without a test split, a part of the training split is held out for it."""
    return (splits["train"], splits["test"]) if "test" in splits else hold_out(splits["train"], TEST_SHARE)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel of [n, C, H, W] uint8 images, as pixels in [0, 1], to four decimals; the std is at least 0.01."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    weights = counts / counts.sum(1, keepdim=True)
    means = weights @ values
    stds = (weights * (values - means[:, None]) ** 2).sum(1).sqrt()
    return tuple(round(mean, 4) for mean in means.tolist()), tuple(max(round(std, 4), 0.01) for std in stds.tolist())


# Files


def _listed(config: DataConfig) -> dict[str, Files]:
    """The files of each split of the data set in `data_dir`, checked."""
    path = data_path(config, FORMS)
    files = _list_files(path)
    _check(path, files)
    return files


def _list_files(path: Path) -> dict[str, Files]:
    """The files of each split; those of a folder without splits are under train."""
    if not path.is_dir():
        raise UserError(f"{path}: not a folder; the data set folder needs one that contains {FORMS}")
    if not _has_splits(path):
        if _has_folders(path / "val"):
            raise UserError(f"{path / 'val'}: has folders of classes, so {path} needs train and test beside it")
        return {"train": _classes(path)}
    for folder in visible_entries(path):
        if folder.is_dir() and folder.name not in SPLITS:
            raise UserError(f"{folder}: not a split; beside train and test there may be a folder val")
    for name in ("train", "test"):
        if not (path / name).is_dir():
            raise UserError(f"{path / name}: no such folder; {path} needs {FORMS}")
    return {name: _classes(path / name) for name in SPLITS if (path / name).is_dir()}


def _has_splits(path: Path) -> bool:
    """Whether train and test are splits. Either one, alone and with images in it, may also be a class."""
    train, test = path / "train", path / "test"
    if train.is_dir() and test.is_dir():
        return True
    return _has_folders(train) or _has_folders(test)


def _has_folders(path: Path) -> bool:
    return path.is_dir() and any(entry.is_dir() for entry in visible_entries(path))


def _classes(folder: Path) -> Files:
    entries = visible_entries(folder)
    for path in entries:
        if not path.is_dir() and path.suffix.lower() in SUFFIXES:
            raise UserError(f"{path}: is outside the class folders")
    return {name: _images(path) for name, path in class_folders(path for path in entries if path.is_dir()).items()}


def _images(folder: Path) -> list[Path]:
    paths = visible_entries(folder)
    if not paths:
        raise UserError(f"{folder}: contains no image")
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: not a plain file; the folder of a class may contain images only")
    return paths


def _check(path: Path, files: dict[str, Files]) -> None:
    """Raises UserError if the splits have different classes, or a class is too small to be split."""
    train = files["train"]
    if len(train) < 2:
        raise UserError(f"{path}: needs the folders of 2 classes or more, has {', '.join(train) or 'none'}; give {FORMS}")
    for name, classes in files.items():
        unmatched = sorted(classes.keys() ^ train.keys())
        if unmatched:
            present, absent = ("train", name) if unmatched[0] in train else (name, "train")
            raise UserError(f"{path / present / unmatched[0]}: class {unmatched[0]} is in {present}, but not in {absent}")
    needed = 1 + ("val" not in files) + ("test" not in files)
    for name, paths in train.items():
        if len(paths) < needed:
            raise UserError(f"{paths[0].parent}: class {name} has {len(paths)} training image(s), at least {needed} are needed")


# Images


def _first_size(files: dict[str, Files]) -> int:
    path = next(iter(files["train"].values()))[0]
    width, height = stored_size(path.read_bytes(), str(path))
    if width != height:
        raise UserError(f"{path}: the image is {width} x {height}, not square: give --image-size")
    return width


def _read(files: Files, size: int, resize: bool) -> Images:
    paths = list(chain.from_iterable(files.values()))
    raw = decode_all(len(paths), size, lambda row: _image(paths[row], size, resize))
    return in_content_order(from_arrays(raw, _labels(files), len(files), str(paths[0].parent.parent)))


def _labels(files: Files) -> list[int]:
    return [label for label, images in enumerate(files.values()) for _ in images]


def _image(path: Path, size: int, resize: bool) -> np.ndarray:
    data = path.read_bytes()
    width, height = (size, size) if resize else stored_size(data, str(path))
    if (width, height) != (size, size):
        raise UserError(f"{path}: the image is {width} x {height}, the first one {size} x {size}: give --image-size")
    return decode_fitted(data, size, str(path))

"""TinyImageNet (Stanford CS231n): 200 classes of ImageNet at 64 x 64, from its folder or directly from its zip."""

import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from advmoe.config import DataConfig
from advmoe.data.archive import open_zip, read_entry
from advmoe.data.decode import decode, decode_all
from advmoe.data.images import (
    Counts,
    Images,
    ImageSpec,
    Splits,
    count_splits,
    from_arrays,
    in_content_order,
    make_splits,
    only_labels,
)
from advmoe.data.paths import data_path, os_errors_as_user_errors
from advmoe.errors import UserError, short_repr

SIZE = 64
MAX_WNID = 64  # characters of the name of a class; they are "n" and eight digits
NAME = "tiny-imagenet-200"
FORMS = f"{NAME} (folder) or {NAME}.zip"
WNIDS, ANNOTATIONS = "wnids.txt", "val/val_annotations.txt"
MEAN, STD = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)


def spec(config: DataConfig) -> ImageSpec:
    """The spec; its classes are the sorted WordNet ids of `wnids.txt`, or numbered names without `data_dir`."""
    if config.data_dir is None:
        return _spec([f"class-{number:03d}" for number in range(200)])
    with os_errors_as_user_errors(config.data_dir), _open(data_path(config, FORMS)) as tree:
        return _spec(_wnids(tree))


def _spec(classes: Sequence[str]) -> ImageSpec:
    return ImageSpec(tuple(classes), (3, SIZE, SIZE), MEAN, STD)


def load(config: DataConfig) -> Splits:
    """TinyImageNet in `data_dir`. The test split is the official val set, because the official test set has no labels.

    The validation split is held out of the training images. Raises UserError, with the file and line, if something is
    missing, damaged or has no label.
    """
    with os_errors_as_user_errors(config.data_dir), _open(data_path(config, FORMS)) as tree:
        wnids = _wnids(tree)
        train, test = (_decoded(tree, listing, len(wnids)) for listing in (_train(tree, wnids), _val(tree, wnids)))
    return make_splits("tinyimagenet", _spec(wnids), train, test, config)


def count(config: DataConfig) -> Counts:
    """The number of images in each split. Raises UserError as `load`, but not for images that cannot be decoded."""
    with os_errors_as_user_errors(config.data_dir), _open(data_path(config, FORMS)) as tree:
        wnids = _wnids(tree)
        train, test = (only_labels(listing.labels, len(wnids), tree.path) for listing in (_train(tree, wnids), _val(tree, wnids)))
    return count_splits(train, test, len(wnids), config)


class _Listing(NamedTuple):
    """Names of image files in a tree, and their labels."""

    names: list[str]
    labels: list[int]


@dataclass(frozen=True)
class _Tree:
    """The files of a folder or an archive: `folders` has the sorted names of the visible files in each folder."""

    path: str
    folders: dict[str, list[str]]
    read: Callable[[str], bytes]

    def where(self, name: str) -> str:
        return f"{self.path}/{name}"

    def lines(self, name: str) -> list[str]:
        """The lines of a text file in UTF-8, without line ends; a byte order mark at its beginning is skipped."""
        folder, _, file = name.rpartition("/")
        if file not in self.folders.get(folder, ()):
            raise UserError(f"{self.path}: contains no {name}; give a path that contains {FORMS}")
        try:
            return self.read(name).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{self.where(name)}: not a text file in UTF-8") from None


def _tree(path: str, names: Sequence[str], read: Callable[[str], bytes]) -> _Tree:
    folders = defaultdict(list)
    for name in sorted(set(names)):
        folder, _, file = name.rpartition("/")
        if not file.startswith("."):
            folders[folder].append(file)
    return _Tree(path, dict(folders), read)


@contextmanager
def _open(path: Path) -> Iterator[_Tree]:
    root = next((candidate for candidate in (path / NAME, path / f"{NAME}.zip") if candidate.exists()), path)
    if root.is_dir():
        files = [file for pattern in (WNIDS, "train/*/images/*", "val/*", "val/images/*") for file in root.glob(pattern)]
        names = [file.relative_to(root).as_posix() for file in files if file.is_file()]
        yield _tree(str(root), names, lambda name: (root / name).read_bytes())
        return
    with open_zip(root) as archive:
        yield _zip_tree(root, archive)


def _zip_tree(path: Path, archive: zipfile.ZipFile) -> _Tree:
    """Members are read and never unpacked, so nothing is written, whatever their names."""
    members = [name for name in archive.namelist() if not name.endswith("/")]
    root = next((name.removesuffix(WNIDS) for name in members if name.rpartition("/")[2] == WNIDS), "")
    lock = Lock()  # the decoding threads share one file position

    def read(name: str) -> bytes:
        with lock:
            return read_entry(archive, root + name, f"{path}/{name}")

    return _tree(str(path), [name.removeprefix(root) for name in members if name.startswith(root)], read)


def _wnids(tree: _Tree) -> list[str]:
    wnids = [line.strip() for line in tree.lines(WNIDS) if line.strip()]
    for wnid in wnids:
        if len(wnid) > MAX_WNID or not wnid.isprintable():
            raise UserError(f"{tree.where(WNIDS)}: {short_repr(wnid)} is not the name of a class")
    duplicate = next((wnid for wnid, times in Counter(wnids).items() if times > 1), None)
    if duplicate is not None or not wnids:
        raise UserError(f"{tree.where(WNIDS)}: {'is empty' if duplicate is None else f'{duplicate} is listed twice'}")
    return sorted(wnids)


def _train(tree: _Tree, wnids: Sequence[str]) -> _Listing:
    names: list[str] = []
    labels: list[int] = []
    for label, wnid in enumerate(wnids):
        folder = f"train/{wnid}/images"
        if folder not in tree.folders:
            raise UserError(f"{tree.where(folder)}: contains no image")
        names += [f"{folder}/{file}" for file in tree.folders[folder]]
        labels += [label] * len(tree.folders[folder])
    for folder in tree.folders:
        parts = folder.split("/")
        if parts[0] == "train" and parts[2:] == ["images"] and parts[1] not in wnids:
            raise UserError(f"{tree.where(f'train/{parts[1]}')}: {parts[1]} is not in {WNIDS}")
    return _Listing(names, labels)


def _val(tree: _Tree, wnids: Sequence[str]) -> _Listing:
    files, where = tree.folders.get("val/images", []), tree.where(ANNOTATIONS)
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    labels: dict[str, int] = {}
    for number, line in enumerate(tree.lines(ANNOTATIONS), 1):
        if not line.strip():
            continue
        file, wnid = _annotation(line, f"{where}: line {number}")
        if wnid not in label_of:
            raise UserError(f"{where}: line {number}: {wnid!r} is not in {WNIDS}")
        if file in labels:
            raise UserError(f"{where}: line {number}: {file} is listed twice")
        labels[file] = label_of[wnid]
    _check_labels(tree, files, labels)
    return _Listing([f"val/images/{file}" for file in files], [labels[file] for file in files])


def _annotation(line: str, where: str) -> tuple[str, str]:
    """(file name, WordNet id) of a line; the box that follows is not used."""
    fields = line.split("\t")
    if len(fields) < 2 or not fields[0]:
        raise UserError(f"{where}: {line[:60]!r} is not a file, a WordNet id and a box, separated by tabs")
    return fields[0], fields[1].strip()


def _check_labels(tree: _Tree, files: Sequence[str], labels: dict[str, int]) -> None:
    missing, unlabelled = sorted(labels.keys() - set(files)), sorted(set(files) - labels.keys())
    if missing:
        raise UserError(f"{tree.where(f'val/images/{missing[0]}')}: no such file, but it is listed in {ANNOTATIONS}")
    if unlabelled:
        raise UserError(f"{tree.where(f'val/images/{unlabelled[0]}')}: has no line in {ANNOTATIONS}")


def _decoded(tree: _Tree, listing: _Listing, num_classes: int) -> Images:
    names, labels = listing

    def image(row: int) -> np.ndarray:
        return decode(tree.read(names[row]), SIZE, tree.where(names[row]))

    return in_content_order(from_arrays(decode_all(len(names), SIZE, image), labels, num_classes, tree.path))

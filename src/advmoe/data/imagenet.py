"""ImageNet (ILSVRC 2012, Russakovsky et al. 2015), streamed from class folders or from tar shards.

Results are reported on the official validation set, which is called `test` here: the official test labels were never published.
"""

import hashlib
import re
import tarfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from advmoe.config import DataConfig
from advmoe.data.archive import check_member
from advmoe.data.images import ImageSpec, Splits, train_val_test
from advmoe.data.paths import class_folders, data_path, os_errors_as_user_errors, visible_entries
from advmoe.data.shards import files_by_split
from advmoe.data.stream import SIDE, Entry, Streamed, stream
from advmoe.errors import UserError, reason_of

SUFFIXES = (".jpeg", ".jpg", ".png")
FORMS = "train/CLASS/ and val/CLASS/ with images, or shards like NAME-train-000000.tar and NAME-val-000000.tar"
NUM_CLASSES = 1000
SAMPLE = 64  # images of each split whose content goes into the fingerprint
SHARD = re.compile(r".+[-_.]\d+\.tar")
BLOCK = 512  # bytes: the unit of a tar

LoadedSplit = tuple[tuple[str, ...], Streamed]  # class names and images


def load(config: DataConfig) -> Splits:
    """ImageNet, or any subset of its classes in the same form, in `data_dir`; the images stay there.

    The validation split is held out of the training images, and evaluated with the centre crop. Shards are indexed in one pass
    that unpacks nothing: 29 microseconds a member from cached shards, about 75 s for all of ImageNet. The index is not stored.
    Raises UserError, with the path, if something is missing or damaged; a damaged image raises it later, when it is decoded.
    """
    with os_errors_as_user_errors(config.data_dir):
        path = _folder(config)
        (classes, train), (test_classes, test) = _read(path, "train"), _read(path, "val")
        _check_classes(path, classes, test_classes)
        digest = fingerprint(classes, train, test)
    return Splits("imagenet", _spec(classes), digest, *train_val_test(train, test, len(classes), config))


def spec(config: DataConfig) -> ImageSpec:
    """The spec, without reading images: of the classes in `data_dir`, or of 1000 if it is None. Raises UserError as `load`."""
    if config.data_dir is None:
        return _spec(_numbered(NUM_CLASSES))
    with os_errors_as_user_errors(config.data_dir):
        path = _folder(config)
        folders = path / "train"
        return _spec(tuple(_class_folders(folders)) if folders.is_dir() else _read(path, "train")[0])


def fingerprint(classes: Sequence[str], *splits: Streamed) -> str:
    """SHA-256 of the class, name and size in bytes of every image in order, and of the content of 64 images a split, evenly spread.

    Reading all 150 GB would take an hour. An image that changed but kept its size may go unnoticed.
    """
    digest = hashlib.sha256(repr(tuple(classes)).encode())
    for images in splits:
        digest.update(len(images).to_bytes(8, "little"))
        for column in (images.files.ends, images.files.text, images.files.sizes, images.labels.numpy()):
            digest.update(column.tobytes())
        for row in np.unique(np.linspace(0, len(images) - 1, SAMPLE).round().astype(np.int64)):
            digest.update(images.files.read(int(row)))
    return digest.hexdigest()


def _spec(classes: tuple[str, ...]) -> ImageSpec:
    return ImageSpec(classes, (3, SIDE, SIDE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"class-{number:04d}" for number in range(count))


def _folder(config: DataConfig) -> Path:
    path = data_path(config, FORMS)
    if not path.is_dir():
        raise UserError(f"{path}: is one file; give a folder that contains {FORMS}")
    return path


def _read(path: Path, split: str) -> LoadedSplit:
    if (path / "train").is_dir():
        return _read_folders(path, split)
    shards = files_by_split(path, (file for file in visible_entries(path) if SHARD.fullmatch(file.name)))
    if split in shards:
        return _read_shards(path, shards[split])
    raise UserError(f"{path}: contains no {split}/ and no shard like NAME-{split}-000000.tar; needed are {FORMS}")


def _check_classes(path: Path, train: tuple[str, ...], val: tuple[str, ...]) -> None:
    if train != val:
        unmatched = min(set(train) ^ set(val))
        incomplete = "val" if unmatched in train else "train"
        raise UserError(f"{path}: {len(train)} classes in train, {len(val)} in val; {incomplete} has no {unmatched}")


# Folders of images, one for each class


def _class_folders(folder: Path) -> dict[str, Path]:
    """Class name -> folder, sorted by name."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    folders = class_folders(path for path in visible_entries(folder) if path.is_dir())
    if not folders:
        raise UserError(f"{folder}: contains no class folder")
    return folders


def _read_folders(path: Path, split: str) -> LoadedSplit:
    folders = _class_folders(path / split)
    entries = (_entries(path, folder, label) for label, folder in enumerate(folders.values()))
    return tuple(folders), stream(str(path), chain.from_iterable(entries))


def _entries(root: Path, folder: Path, label: int) -> list[Entry]:
    files = (path for path in visible_entries(folder) if path.suffix.lower() in SUFFIXES)
    statuses = ((str(path.relative_to(root)), path.stat()) for path in files)
    entries = [Entry(name, 0, status.st_size, label, status.st_mtime_ns) for name, status in statuses]
    if not entries:
        raise UserError(f"{folder}: contains no image ({', '.join(SUFFIXES)})")
    return entries


# Tar shards (the form that the WebDataset library reads): KEY.jpg, and KEY.cls with the number of the class as text


def _read_shards(path: Path, shards: Sequence[Path]) -> LoadedSplit:
    images = stream(str(path), chain.from_iterable(map(_shard, shards)))
    if len(images) == 0:
        raise UserError(f"{shards[0]}: contains no image, nor does any shard after it")
    present = np.unique(images.labels.numpy())
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if len(gaps):
        raise UserError(f"{shards[0]} to {shards[-1].name}: no image of class {gaps[0]}, though labels go to {present[-1]}")
    return _numbered(len(present)), images


def _shard(path: Path) -> list[Entry]:
    """The images of one shard in their order, each as the position of its bytes."""
    modified = path.stat().st_mtime_ns  # read first, so that `Files.read` notices a later change
    try:
        images, labels = _members(path)
    except (UserError, OSError):
        raise
    except Exception as error:  # a damaged header can raise nearly any exception
        raise UserError(f"{path}: damaged or incomplete tar archive ({reason_of(error)})") from None
    for key in sorted(images.keys() ^ labels.keys()):
        name, absent = (f"{key}.cls", "image") if key in labels else (images[key].name, ".cls")
        raise UserError(f"{path}: {name} has no {absent} beside it")
    return [
        Entry(f"{path.name}\0{member.name}", member.offset_data, member.size, labels[key], modified)
        for key, member in images.items()
    ]


def _members(path: Path) -> tuple[dict[str, tarfile.TarInfo], dict[str, int]]:
    """The members that are images and the labels, by key."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    end = 0
    with tarfile.open(path, "r:") as archive, path.open("rb") as raw:
        for member in archive:
            check_member(path, member)
            end = member.offset_data + -(-member.size // BLOCK) * BLOCK
            key, suffix = _key(member.name)
            if member.isdir() or suffix not in (*SUFFIXES, ".cls"):
                continue
            if key in (labels if suffix == ".cls" else images):
                raise UserError(f"{path}: {key} occurs twice")
            if suffix == ".cls":
                labels[key] = _label(path, member, raw)
            else:
                images[key] = member
        raw.seek(end)
        if raw.read(BLOCK) != bytes(BLOCK):  # tarfile takes a cut between two members for the end of the archive
            raise UserError(f"{path}: damaged or incomplete tar archive (no end mark after byte {end})")
    return images, labels


def _key(name: str) -> tuple[str, str]:
    """(key, suffix) of a member's name, split at the first dot of the file name as WebDataset does; the suffix in lower case."""
    folder, slash, last = name.rpartition("/")
    key, dot, suffix = last.partition(".")
    return folder + slash + key, (dot + suffix).lower()


def _label(path: Path, member: tarfile.TarInfo, raw: BinaryIO) -> int:
    raw.seek(member.offset_data)
    content = raw.read(min(member.size, BLOCK))
    if len(content) < min(member.size, BLOCK):
        raise tarfile.ReadError(f"ends within {member.name}")
    text = content.decode("utf-8-sig", errors="replace").strip()
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{path}: {member.name}: label {text[:40]!r} is not a whole number from 0")
    return int(text)

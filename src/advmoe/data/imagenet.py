"""ImageNet (ILSVRC 2012, Russakovsky et al. 2015), streamed from class folders or from tar shards.

The official validation set is the one that is reported, as `test`: the test labels were never published.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from advmoe.config import DataConfig
from advmoe.data.images import ImageSpec, Splits, parts
from advmoe.data.place import check_member, place_of, readable, visible
from advmoe.data.stream import SIDE, Entry, Streamed, stream
from advmoe.errors import UserError

SUFFIXES = (".jpeg", ".jpg", ".png")
FORMS = "train/CLASS/ and val/CLASS/ with images, or shards like NAME-train-000000.tar and NAME-val-000000.tar"
NUM_CLASSES = 1000
SAMPLE = 64  # images of each part whose content goes into the fingerprint
BLOCK = 512  # bytes: tar's unit

Part = tuple[tuple[str, ...], Streamed]  # class names and images


def load(config: DataConfig) -> Splits:
    """ImageNet, or any subset of its classes in the same form, from `data_dir`; images stay there.

    Training images are held out for validation as everywhere, and seen there through the centre crop. Shards are
    indexed in one pass that unpacks nothing: 29 microseconds a member from cached shards, about 75 s for all of them, so
    the index is not kept. Raises UserError, with the path, where something is missing or damaged; a damaged image is
    found when it is decoded.
    """
    with readable(config):
        place = _folder_of(config)
        (classes, train), (others, test) = _read(place, "train"), _read(place, "val")
        _check_classes(place, classes, others)
        digest = fingerprint(classes, train, test)
    return Splits("imagenet", _spec(classes), digest, *parts(train, test, len(classes), config))


def spec(config: DataConfig) -> ImageSpec:
    """What is known before images are read: the classes in `data_dir`, or the 1000 without one. Raises UserError as `load`."""
    if config.data_dir is None:
        return _spec(_numbered(NUM_CLASSES))
    with readable(config):
        place = _folder_of(config)
        folders = place / "train"
        return _spec(_class_names(folders) if folders.is_dir() else _read(place, "train")[0])


def fingerprint(classes: Sequence[str], *parts: Streamed) -> str:
    """SHA-256 over the class, name and size in bytes of every image in order, and over the content of 64 images a part,
    evenly spread. Reading the 150 GB whole would take an hour: a changed image of the same size may go unseen.
    """
    digest = hashlib.sha256(repr(tuple(classes)).encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        for column in (part.files.ends, part.files.text, part.files.sizes, part.labels.numpy()):
            digest.update(column.tobytes())
        for row in np.unique(np.linspace(0, len(part) - 1, SAMPLE).round().astype(np.int64)):
            digest.update(part.files.read(int(row)))
    return digest.hexdigest()


def _spec(classes: tuple[str, ...]) -> ImageSpec:
    return ImageSpec(classes, (3, SIDE, SIDE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"class-{number:04d}" for number in range(count))


def _folder_of(config: DataConfig) -> Path:
    place = place_of(config, FORMS)
    if not place.is_dir():
        raise UserError(f"{place}: is one file; give a folder that holds {FORMS}")
    return place


def _read(place: Path, part: str) -> Part:
    if (place / "train").is_dir():
        return _read_folders(place, part)
    if shards := _shards(place, part):
        return _read_shards(place, shards)
    raise UserError(f"{place}: holds no {part}/ and no shard like NAME-{part}-000000.tar; wanted are {FORMS}")


def _check_classes(place: Path, train: tuple[str, ...], val: tuple[str, ...]) -> None:
    if train != val:
        odd = min(set(train) ^ set(val))
        lacking = "val" if odd in train else "train"
        raise UserError(f"{place}: {len(train)} classes in train, {len(val)} in val; {lacking} has no {odd}")


# Folders of images by class


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    names = tuple(path.name for path in visible(folder) if path.is_dir())
    if not names:
        raise UserError(f"{folder}: holds no class folder")
    return names


def _read_folders(place: Path, part: str) -> Part:
    classes = _class_names(place / part)
    folders = (_folder(place, f"{part}/{name}", label) for label, name in enumerate(classes))
    return classes, stream(str(place), chain.from_iterable(folders))


def _folder(place: Path, name: str, label: int) -> list[Entry]:
    files = (path for path in visible(place / name) if path.suffix.lower() in SUFFIXES)
    entries = [_entry(f"{name}/{path.name}", label, path.stat()) for path in files]
    if not entries:
        raise UserError(f"{place / name}: holds no image ({', '.join(SUFFIXES)})")
    return entries


def _entry(name: str, label: int, state: os.stat_result) -> Entry:
    return Entry(name, 0, state.st_size, label, state.st_mtime_ns)


# Tar shards: KEY.jpg and KEY.cls, the class as a whole number in text (the form that the WebDataset library reads)


def _shards(place: Path, part: str) -> list[Path]:
    return [path for path in visible(place) if re.fullmatch(rf".*{part}.*-\d+\.tar", path.name)]


def _read_shards(place: Path, shards: Sequence[Path]) -> Part:
    images = stream(str(place), chain.from_iterable(map(_shard, shards)))
    if len(images) == 0:
        raise UserError(f"{shards[0]}: holds no image, nor does any shard after it")
    present = np.unique(images.labels.numpy())
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if len(gaps):
        raise UserError(f"{shards[0]} to {shards[-1].name}: no image of class {gaps[0]}, though labels go to {present[-1]}")
    return _numbered(len(present)), images


def _shard(path: Path) -> list[Entry]:
    """The images of one shard in its order, each as the place of its bytes."""
    modified = path.stat().st_mtime_ns  # before it is read: what is written meanwhile shows when an image is asked for
    try:
        images, labels = _members(path)
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a whole tar archive ({' '.join(str(error).split())[:120]})") from None
    for key in sorted(images.keys() ^ labels.keys()):
        name, lacking = (f"{key}.cls", "image") if key in labels else (images[key].name, ".cls")
        raise UserError(f"{path}: {name} has no {lacking} beside it")
    return [
        Entry(f"{path.name}\0{member.name}", member.offset_data, member.size, labels[key], modified)
        for key, member in images.items()
    ]


def _members(path: Path) -> tuple[dict[str, tarfile.TarInfo], dict[str, int]]:
    """By key: the members that are images, and the labels."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    end = 0
    with tarfile.open(path, "r:") as archive, path.open("rb") as raw:
        for member in archive:
            check_member(path, member)
            end = member.offset_data + -(-member.size // BLOCK) * BLOCK
            key, kind = _key(member.name)
            if member.isdir() or kind not in (*SUFFIXES, ".cls"):
                continue
            if key in (labels if kind == ".cls" else images):
                raise UserError(f"{path}: {key} stands there twice")
            if kind == ".cls":
                labels[key] = _label(path, member, raw)
            else:
                images[key] = member
        raw.seek(end)
        if raw.read(BLOCK) != bytes(BLOCK):  # tarfile takes a cut between two members for the end
            raise UserError(f"{path}: not a whole tar archive (no end mark after byte {end})")
    return images, labels


def _key(name: str) -> tuple[str, str]:
    """A member's name before and from the first dot of its last part, as WebDataset splits it; the latter in lower case."""
    folder, slash, last = name.rpartition("/")
    key, dot, kind = last.partition(".")
    return folder + slash + key, (dot + kind).lower()


def _label(path: Path, member: tarfile.TarInfo, raw: BinaryIO) -> int:
    raw.seek(member.offset_data)
    content = raw.read(min(member.size, BLOCK))
    if len(content) < min(member.size, BLOCK):
        raise tarfile.ReadError(f"ends within {member.name}")
    text = content.decode("ascii", errors="replace").strip()
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{path}: {member.name}: label {text[:40]!r} is not a whole number from 0")
    return int(text)

"""CIFAR-10 (Krizhevsky 2009) in every form that people have it in."""

import io
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from advmoe.config import DataConfig
from advmoe.data.decode import JPEG_MAGIC, decode_all
from advmoe.data.pictures import Pictures, PictureSpec, Splits, fingerprint, from_arrays, hold_out, in_content_order, limit
from advmoe.errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCHES = ("test_batch",)
FORMS = "cifar-10-batches-py (folder), cifar-10-python.tar.gz, train*.parquet and test*.parquet, or train/CLASS/ and test/CLASS/"
SIZE = 32
SPEC = PictureSpec(CLASSES, (3, SIZE, SIZE), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

Part = tuple[Pictures, bool]  # the pictures, and whether they had been JPEG


def load(config: DataConfig) -> Splits:
    """CIFAR-10 from `data_dir`; named cifar10-jpeg where pictures had been JPEG.

    The order is that of the content, so every lossless form gives the same fingerprint and held-out part.
    Raises UserError, with the path and row, where something is missing or damaged.
    """
    if config.data_dir is None:
        raise UserError(f"cifar10 needs --data-dir: a place that holds {FORMS}")
    place = Path(config.data_dir)
    try:
        parts = _read(place)
    except OSError as error:
        raise UserError(f"{error.filename or place}: cannot be read ({error.strerror or error})") from None
    train, test = (in_content_order(pictures) for pictures, _ in parts)
    name = "cifar10-jpeg" if any(was_jpeg for _, was_jpeg in parts) else "cifar10"
    rest, val = hold_out(train, config.validation_share)
    if config.limit_train is not None:
        val = limit(val, max(config.limit_train // 10, len(CLASSES)))
    rest, reported = limit(rest, config.limit_train), limit(test, config.limit_test)
    return Splits(name, SPEC, fingerprint(train, test), rest, val, reported)


def _read(place: Path) -> tuple[Part, Part]:
    if not place.exists():
        raise UserError(f"{place}: no such file or folder")
    if place.is_file() and place.suffix == ".parquet":
        raise UserError(f"{place}: is one file; give the folder that holds train*.parquet and test*.parquet")
    if place.is_file():
        return _read_tar(place)
    for folder in (place, place / "cifar-10-batches-py"):
        if any((folder / name).exists() for name in (*TRAIN_BATCHES, *TEST_BATCHES)):
            return _read_batches(folder)
    if (place / "cifar-10-python.tar.gz").exists():
        return _read_tar(place / "cifar-10-python.tar.gz")
    if any(place.glob("**/*.parquet")):
        return _read_parquet(place, "train"), _read_parquet(place, "test")
    if (place / "train").is_dir():
        return _read_folders(place / "train"), _read_folders(place / "test")
    raise UserError(f"{place}: holds none of {FORMS}")


# The Python batches, in a folder or in the tar.gz


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _BatchUnpickler(pickle.Unpickler):
    """Builds dicts, lists, bytes and numpy arrays; anything else in the pickle is refused, so no code of it runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_batches(folder: Path) -> tuple[Part, Part]:
    names = (*TRAIN_BATCHES, *TEST_BATCHES)
    return _by_part({name: _batch((folder / name).read_bytes(), str(folder / name)) for name in names})


def _read_tar(path: Path) -> tuple[Part, Part]:
    try:
        batches = _tar_batches(path)
    except (UserError, PermissionError):
        raise
    except Exception as error:  # a damaged archive raises nearly anything
        raise UserError(f"{path}: not a whole tar archive ({' '.join(str(error).split())[:120]})") from None
    for name in (*TRAIN_BATCHES, *TEST_BATCHES):
        if name not in batches:
            raise UserError(f"{path}: holds no file cifar-10-batches-py/{name}")
    return _by_part(batches)


def _tar_batches(path: Path) -> dict[str, Pictures]:
    """The batches of an archive in one pass; members are read, never unpacked: nothing is written, wherever they point."""
    batches = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            file = archive.extractfile(member) if member.isfile() and name in (*TRAIN_BATCHES, *TEST_BATCHES) else None
            if file is not None:
                batches[name] = _batch(file.read(), f"{path}: {name}")
        while archive.fileobj is not None and archive.fileobj.read(2**20):
            pass  # to the end, where gzip has its checksum
    return batches


def _by_part(batches: Mapping[str, Pictures]) -> tuple[Part, Part]:
    return (_join([batches[name] for name in TRAIN_BATCHES]), False), (_join([batches[name] for name in TEST_BATCHES]), False)


def _batch(content: bytes, where: str) -> Pictures:
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
        images = np.asarray(batch[b"data"]).reshape(-1, 3, SIZE, SIZE)
        labels = list(batch[b"labels"])
        if images.dtype != np.uint8:
            raise TypeError(f"data of type {images.dtype}, not uint8")
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{where}: not a CIFAR-10 batch ({type(error).__name__}: {' '.join(str(error).split())[:120]})") from None
    return from_arrays(images, labels, len(CLASSES), where)


def _join(parts: Sequence[Pictures]) -> Pictures:
    return Pictures(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


# Parquet


def _read_parquet(place: Path, part: str) -> Part:
    paths = sorted(path for path in place.glob("**/*.parquet") if path.name.startswith(part))
    if not paths:
        raise UserError(f"{place}: holds no {part}*.parquet")
    parts = [_parquet_file(path) for path in paths]
    return _join([pictures for pictures, _ in parts]), any(was_jpeg for _, was_jpeg in parts)


def _parquet_file(path: Path) -> Part:
    try:
        table = pyarrow.parquet.read_table(path, partitioning=None)
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole Parquet file ({' '.join(str(error).split())[:120]})") from None
    column = next((name for name in ("img", "image") if name in table.column_names), None)
    if column is None or "label" not in table.column_names:
        raise UserError(f"{path}: needs columns img and label, has {', '.join(table.column_names)}")
    rows = table[column].to_pylist()
    items: list[Any] = [row.get("bytes") if isinstance(row, dict) else row for row in rows]
    for number, item in enumerate(items):
        if not isinstance(item, bytes):
            raise UserError(f"{path}: row {number} holds no picture bytes")
    images = decode_all(items, SIZE, lambda row: f"{path}: row {row}")
    pictures = from_arrays(images, table["label"].to_pylist(), len(CLASSES), str(path))
    return pictures, any(item.startswith(JPEG_MAGIC) for item in items)


# Folders of pictures by class


def _read_folders(folder: Path) -> Part:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    missing = [name for name in CLASSES if not (folder / name).is_dir()]
    if missing:
        raise UserError(f"{folder}: no folder for class {missing[0]}")
    paths, labels = [], []
    for label, name in enumerate(CLASSES):
        found = sorted(path for path in (folder / name).iterdir() if path.is_file() and not path.name.startswith("."))
        paths += found
        labels += [label] * len(found)
        if not found:
            raise UserError(f"{folder / name}: holds no picture")
    items = [path.read_bytes() for path in paths]
    images = decode_all(items, SIZE, lambda row: str(paths[row]))
    return from_arrays(images, labels, len(CLASSES), str(folder)), any(item.startswith(JPEG_MAGIC) for item in items)

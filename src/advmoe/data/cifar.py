"""CIFAR-10 (Krizhevsky 2009) in every form that people have it in."""

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from advmoe.config import DataConfig
from advmoe.data.decode import JPEG_MAGIC, decode_all
from advmoe.data.pictures import Pictures, PictureSpec, Splits, fingerprint, from_arrays, hold_out, limit
from advmoe.errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCHES = ("test_batch",)
FORMS = "cifar-10-batches-py (folder), cifar-10-python.tar.gz, train*.parquet and test*.parquet, or train/CLASS/ and test/CLASS/"
SIZE = 32
SPEC = PictureSpec(CLASSES, (3, SIZE, SIZE), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

Part = tuple[Pictures, bool]  # the pictures, and whether they had been JPEG


def load(config: DataConfig) -> Splits:
    """CIFAR-10 from `data_dir`; named cifar10-jpeg where the pictures had been compressed with loss."""
    if config.data_dir is None:
        raise UserError(f"cifar10 needs --data-dir: a place that holds {FORMS}")
    place = Path(config.data_dir)
    (train, was_jpeg), (test, _) = _reader(place)
    rest, val = hold_out(train, config.validation_share)
    if config.limit_train is not None:
        val = limit(val, max(config.limit_train // 10, len(CLASSES)))
    return Splits(
        "cifar10-jpeg" if was_jpeg else "cifar10", SPEC, fingerprint(train, test), limit(rest, config.limit_train), val, limit(test, config.limit_test),
    )  # fmt: skip


def _reader(place: Path) -> tuple[Part, Part]:
    if not place.exists():
        raise UserError(f"{place}: no such file or folder")
    if place.is_file():
        return _read_tar(place)
    for folder in (place, place / "cifar-10-batches-py"):
        if (folder / "data_batch_1").exists():
            return _read_batches(lambda name: (folder / name).read_bytes(), lambda name: str(folder / name))
    if (place / "cifar-10-python.tar.gz").exists():
        return _read_tar(place / "cifar-10-python.tar.gz")
    if any(place.glob("**/*.parquet")):
        return _read_parquet(place, "train"), _read_parquet(place, "test")
    if (place / "train").is_dir():
        return _read_folders(place / "train"), _read_folders(place / "test")
    raise UserError(f"{place}: holds none of {FORMS}")


# The Python batches, in a folder or in the tar.gz


class _BatchUnpickler(pickle.Unpickler):
    """Builds dicts, lists, bytes and numpy arrays; anything else in the pickle is refused, so no code of it runs."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct", "ndarray", "dtype", "encode"}
        if module.split(".")[0] in ("numpy", "_codecs") and name in allowed:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_batches(read: Callable[[str], bytes], where: Callable[[str], str]) -> tuple[Part, Part]:
    return tuple((_join([_batch(read, name, where(name)) for name in names]), False) for names in (TRAIN_BATCHES, TEST_BATCHES))  # type: ignore[return-value]


def _batch(read: Callable[[str], bytes], name: str, where: str) -> Pictures:
    try:
        content = _BatchUnpickler(io.BytesIO(read(name)), encoding="bytes").load()
        images = np.asarray(content[b"data"], dtype=np.uint8).reshape(-1, 3, SIZE, SIZE)
        labels = list(content[b"labels"])
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{where}: not a CIFAR-10 batch ({type(error).__name__}: {' '.join(str(error).split())[:120]})") from None
    return from_arrays(images, labels, len(CLASSES), where)


def _join(parts: Sequence[Pictures]) -> Pictures:
    images = np.concatenate([part.images.numpy() for part in parts])
    return from_arrays(images, np.concatenate([part.labels.numpy() for part in parts]), len(CLASSES), "CIFAR-10")


def _read_tar(path: Path) -> tuple[Part, Part]:
    try:
        with tarfile.open(path) as archive:
            return _read_batches(lambda name: _member(archive, name, path), lambda name: f"{path}: {name}")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path}: not a whole tar archive ({error})") from None


def _member(archive: tarfile.TarFile, name: str, path: Path) -> bytes:
    """A member is read, never unpacked: nothing is written, wherever it points."""
    try:
        file = archive.extractfile(f"cifar-10-batches-py/{name}")
    except KeyError:
        file = None
    if file is None:
        raise UserError(f"{path}: holds no file cifar-10-batches-py/{name}")
    return file.read()


# Parquet


def _read_parquet(place: Path, part: str) -> Part:
    paths = sorted(path for path in place.glob("**/*.parquet") if path.name.startswith(part))
    if not paths:
        raise UserError(f"{place}: holds no {part}*.parquet")
    parts = [_parquet_file(path) for path in paths]
    return _join([pictures for pictures, _ in parts]), any(was_jpeg for _, was_jpeg in parts)


def _parquet_file(path: Path) -> Part:
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole Parquet file ({' '.join(str(error).split())[:120]})") from None
    column = next((name for name in ("img", "image") if name in table.column_names), None)
    if column is None or "label" not in table.column_names:
        raise UserError(f"{path}: needs columns img and label, has {', '.join(table.column_names)}")
    rows = table[column].to_pylist()
    items = [row["bytes"] if isinstance(row, dict) else row for row in rows]
    for number, item in enumerate(items):
        if not isinstance(item, bytes):
            raise UserError(f"{path}: row {number} holds no picture bytes")
    images = decode_all(items, SIZE, lambda row: f"{path}: row {row}")
    labels = [-1 if label is None else label for label in table["label"].to_pylist()]
    return from_arrays(images, labels, len(CLASSES), str(path)), any(item.startswith(JPEG_MAGIC) for item in items)


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

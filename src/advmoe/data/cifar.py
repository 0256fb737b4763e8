"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in every form in which they are distributed."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from advmoe.config import DataConfig
from advmoe.data.archive import CHUNK, tar_members
from advmoe.data.arrays import open_npz, read_npy
from advmoe.data.batch_pickle import read_pickle, to_array
from advmoe.data.decode import JPEG_MAGIC, decode, decode_all
from advmoe.data.images import (
    Counts,
    Images,
    ImageSpec,
    Splits,
    count_splits,
    from_arrays,
    images_of_arrays,
    in_content_order,
    make_splits,
    only_labels,
)
from advmoe.data.paths import data_path, os_errors_as_user_errors, visible_entries
from advmoe.data.shards import files_by_split
from advmoe.errors import UserError, reason_of
from advmoe.files import check_plain

SIZE = 32
PARQUET_ROWS = 64  # that are unpacked at once
MAX_BATCH = 2**29  # bytes; the largest batch of the two data sets has 155 million
MAX_MEMBERS = 10_000  # of their archives, which have 9
SPLITS = ("train", "test")
ARRAY_NAMES = (  # of images and labels, for each split; the first pair is Keras's
    ("x_{split}", "y_{split}"), ("X_{split}", "y_{split}"), ("{split}_images", "{split}_labels"),
    ("{split}_data", "{split}_labels"),
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """The differences between the two data sets."""

    name: str
    title: str
    folder: str
    """Name of the folder of the Python batches."""
    archive: str
    train: tuple[str, ...]
    """Names of the batches of the training split."""
    test: tuple[str, ...]
    batch_labels: str
    """Key of the labels in a batch."""
    label_columns: tuple[str, ...]
    """Names that the column of the labels may have in Parquet; the first that is present counts."""
    spec: ImageSpec

    @property
    def forms(self) -> str:
        """The forms that are read, for a message."""
        return (
            f"{self.folder} (folder), {self.archive}, train*.parquet and test*.parquet, an .npz with x_train, y_train, x_test and "
            "y_test, the same as .npy files, or train/CLASS/ and test/CLASS/"
        )


CIFAR10 = Variant(
    "cifar10", "CIFAR-10", "cifar-10-batches-py", "cifar-10-python.tar.gz",
    tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",), "labels", ("label",),
    ImageSpec(
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        (3, SIZE, SIZE), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
    ),
)  # fmt: skip

FINE_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar
    cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl
    hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
    rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

CIFAR100 = Variant(
    "cifar100", "CIFAR-100", "cifar-100-python", "cifar-100-python.tar.gz",
    ("train",), ("test",), "fine_labels", ("fine_label", "label"),
    ImageSpec(tuple(FINE_CLASSES.split()), (3, SIZE, SIZE), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
)  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """Image files that are read and not decoded yet. `names` begin the messages on each, `path` those on all of them."""

    items: Sequence[bytes]
    names: Sequence[str]
    labels: Sequence[int]
    path: Path

    @property
    def has_jpeg(self) -> bool:
        """Whether any image is a JPEG."""
        return any(item.startswith(JPEG_MAGIC) for item in self.items)

    def decoded(self, num_classes: int) -> Images:
        """The images. Raises UserError for one that cannot be decoded, has another size, or a wrong label."""
        raw = decode_all(len(self.items), SIZE, lambda row: decode(self.items[row], SIZE, self.names[row]))
        return from_arrays(raw, self.labels, num_classes, str(self.path))


Split = Sequence[Images | Encoded]  # the parts of a split, from one file each


def load(variant: Variant, config: DataConfig) -> Splits:
    """The data set in `data_dir`; its name ends in -jpeg if any image was a JPEG. CIFAR-100 has its fine labels.

    Images are sorted by content, so that every lossless form gives the same fingerprint and validation split.
    Raises UserError, with the path and row, if something is missing or damaged.
    """
    with os_errors_as_user_errors(config.data_dir):
        path = data_path(config, variant.forms)
        splits = _read(variant, path)
        train, test = (_images(split, len(variant.spec.classes)) for split in splits)
    _check_classes(variant, train, path)
    has_jpeg = any(isinstance(part, Encoded) and part.has_jpeg for split in splits for part in split)
    name = f"{variant.name}-jpeg" if has_jpeg else variant.name
    return make_splits(name, variant.spec, in_content_order(train), in_content_order(test), config)


def count(variant: Variant, config: DataConfig) -> Counts:
    """The number of images in each split. Raises UserError as `load`, but not for images that cannot be decoded."""
    classes = len(variant.spec.classes)
    with os_errors_as_user_errors(config.data_dir):
        path = data_path(config, variant.forms)
        train, test = (_labels(split, classes) for split in _read(variant, path))
    _check_classes(variant, train, path)
    return count_splits(train, test, classes, config)


def _images(split: Split, num_classes: int) -> Images:
    return _concatenate([part.decoded(num_classes) if isinstance(part, Encoded) else part for part in split])


def _labels(split: Split, num_classes: int) -> Images:
    """The split without its pixels."""
    parts = [(part.labels, part.path) if isinstance(part, Encoded) else (part.labels.tolist(), "") for part in split]
    return _concatenate([only_labels(labels, num_classes, str(path)) for labels, path in parts])


def _check_classes(variant: Variant, train: Images, path: Path) -> None:
    counts = torch.bincount(train.labels, minlength=len(variant.spec.classes))
    if not counts.all():  # such as superclasses, or the other data set
        absent = int((counts == 0).nonzero()[0])
        raise UserError(f"{path}: no training image of class {absent} ({variant.spec.classes[absent]}) of {variant.title}")


def _read(variant: Variant, path: Path) -> tuple[Split, Split]:
    if path.is_file():
        return _read_file(variant, path)
    for folder in (path, path / variant.folder):
        if any((folder / name).is_file() for name in (*variant.train, *variant.test)):
            return _read_batches(variant, folder)
    for archive in (path / variant.archive, path / f"{variant.folder}.tar.gz"):  # the latter is Keras's name
        if archive.exists():
            return _read_tar(variant, archive)
    if any(path.glob("**/*.parquet")):
        return _read_parquet(variant, path)
    if (path / "train").is_dir():
        return _read_folders(variant, path / "train"), _read_folders(variant, path / "test")
    arrays = _Arrays(variant, path)
    if arrays.files:
        return arrays.read("train"), arrays.read("test")
    raise UserError(f"{path}: contains none of {variant.forms}")


def _read_file(variant: Variant, path: Path) -> tuple[Split, Split]:
    if path.suffix == ".parquet":
        raise UserError(f"{path}: is one file; give the folder that contains train*.parquet and test*.parquet")
    if path.suffix == ".npy":
        raise UserError(f"{path}: is one array; give the folder that contains x_train.npy, y_train.npy, x_test.npy and y_test.npy")
    if path.suffix == ".npz":
        arrays = _Arrays(variant, path)
        return arrays.read("train"), arrays.read("test")
    if not (path.suffix in (".tar", ".gz", ".tgz") or _is_tar(path)):
        raise UserError(f"{path}: not a file that {variant.title} is read from; give {variant.forms}")
    return _read_tar(variant, path)


def _is_tar(path: Path) -> bool:
    check_plain(path, MAX_BATCH)
    with path.open("rb") as file:
        header = file.read(512)
    return header.startswith(b"\x1f\x8b") or header[257:262] == b"ustar"


# The Python batches, in a folder or in the tar.gz


def _read_batches(variant: Variant, folder: Path) -> tuple[Split, Split]:
    paths = {name: folder / name for name in (*variant.train, *variant.test)}
    return _join_batches(variant, {name: _batch(variant, _content(path), str(path)) for name, path in paths.items()})


def _content(path: Path) -> bytes:
    check_plain(path, MAX_BATCH)
    return path.read_bytes()


def _read_tar(variant: Variant, path: Path) -> tuple[Split, Split]:
    try:
        batches = _tar_batches(variant, path)
    except (UserError, PermissionError):
        raise
    except Exception as error:  # a damaged archive can raise nearly any exception
        raise UserError(f"{path}: damaged or incomplete tar archive ({reason_of(error)})") from None
    for name in (*variant.train, *variant.test):
        if name not in batches:
            raise UserError(f"{path}: contains no file {variant.folder}/{name}")
    return _join_batches(variant, batches)


def _tar_batches(variant: Variant, path: Path) -> dict[str, Images]:
    """The batches in an archive, in one pass. Members are read and never unpacked, so nothing is written, whatever their names."""
    batches: dict[str, Images] = {}
    with closing(tar_members(path)) as members:
        for number, member in enumerate(members):
            if number == MAX_MEMBERS:
                raise UserError(f"{path}: has more than {MAX_MEMBERS} members, too many for {variant.title}")
            name = member.name.rpartition("/")[2]
            if member.content is not None and name in (*variant.train, *variant.test):
                if name in batches:
                    raise UserError(f"{path}: contains two files {name}; keep one of them")
                if member.size > MAX_BATCH:
                    raise UserError(f"{path}: {name} has {member.size:,} bytes; at most {MAX_BATCH:,} are read")
                content = b"".join(iter(partial(member.content.read, CHUNK), b""))
                batches[name] = _batch(variant, content, f"{path}: {name}")
    return batches


def _join_batches(variant: Variant, batches: Mapping[str, Images]) -> tuple[Split, Split]:
    train, test = (_concatenate([batches[name] for name in names]) for names in (variant.train, variant.test))
    return [train], [test]


def _batch(variant: Variant, content: bytes, where: str) -> Images:
    try:
        batch = read_pickle(content)
        if not isinstance(batch, dict):
            raise TypeError(f"it contains a {type(batch).__name__}, not a dict")
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        if missing := {"data", variant.batch_labels} - batch.keys():
            raise TypeError(f"it has no {min(missing)}")
        raw, labels = to_array(batch["data"]), to_array(batch[variant.batch_labels])
        if raw.dtype != np.uint8 or raw.ndim < 2 or raw[0].size != 3 * SIZE**2:
            raise TypeError(f"{raw.dtype} data of shape {raw.shape}, not uint8 of shape (n, {3 * SIZE**2})")
    except Exception as error:  # a damaged pickle can raise nearly any exception
        raise UserError(f"{where}: not a {variant.title} batch ({reason_of(error)})") from None
    return from_arrays(raw.reshape(-1, 3, SIZE, SIZE), labels, len(variant.spec.classes), where)


def _concatenate(images: Sequence[Images]) -> Images:
    if len(images) == 1:
        return images[0]
    return Images(torch.cat([part.raw for part in images]), torch.cat([part.labels for part in images]))


# Numpy arrays


class _Arrays:
    """Arrays of images and labels by name, in an .npz file or as .npy files in a folder."""

    def __init__(self, variant: Variant, path: Path) -> None:
        self.variant, self.path = variant, path
        self.files = [path] if path.is_file() else sorted([*path.glob("*.npy"), *path.glob("*.npz")])

    def read(self, split: str) -> Split:
        """One split. Raises UserError if it is missing or its arrays have other shapes or types."""
        pairs = [(images.format(split=split), labels.format(split=split)) for images, labels in ARRAY_NAMES]
        if len(self.files) == 1 and self.files[0].suffix == ".npz":
            with open_npz(self.files[0]) as archive:
                names = self._names(pairs, archive.names)
                images, labels = (archive[name] for name in names)
        else:
            by_name = {file.stem: file for file in self.files if file.suffix == ".npy"}
            names = self._names(pairs, list(by_name))
            images, labels = (read_npy(by_name[name]) for name in names)
        where = [f"{self.path}: {name}" for name in names]
        return [images_of_arrays(images, labels, self.variant.spec, where[0], where[1])]

    def _names(self, pairs: Sequence[tuple[str, str]], present: Sequence[str]) -> tuple[str, str]:
        fitting = [pair for pair in pairs if pair[0] in present and pair[1] in present]
        if len(fitting) != 1:
            reason = f"no {pairs[0][0]} and {pairs[0][1]}" if not fitting else f"both {fitting[0][0]} and {fitting[1][0]}"
            names = ", ".join(sorted(present)[:8]) or "no .npy file"
            raise UserError(f"{self.path}: has {reason} (there are {names}); give {self.variant.forms}")
        return fitting[0]


# Parquet


def _read_parquet(variant: Variant, path: Path) -> tuple[Split, Split]:
    files = files_by_split(path, path.glob("**/*.parquet"))
    for split in SPLITS:
        if split not in files:
            raise UserError(f"{path}: contains no {split}*.parquet")
    train, test = ([_parquet_file(variant, path) for path in files[split]] for split in SPLITS)
    return train, test


def _bounded_table(path: Path) -> pyarrow.Table:
    """The rows of a Parquet file. Raises UserError if they unpack to more than MAX_BATCH bytes, by the file's own count or ours: a
    value that repeats is stored once. A batch of rows is unpacked before it is counted."""
    batches, size = [], 0
    with pyarrow.parquet.ParquetFile(path) as file:
        if sum(file.metadata.row_group(number).total_byte_size for number in range(file.num_row_groups)) > MAX_BATCH:
            raise UserError(f"{path}: has more than {MAX_BATCH:,} bytes of images, the most that is read")
        for batch in file.iter_batches(PARQUET_ROWS):
            size += batch.nbytes
            if size > MAX_BATCH:
                raise UserError(f"{path}: has more than {MAX_BATCH:,} bytes of images, the most that is read")
            batches.append(batch)
        return pyarrow.Table.from_batches(batches, file.schema_arrow)


def _parquet_file(variant: Variant, path: Path) -> Encoded:
    try:
        table = _bounded_table(path)
        column = next((name for name in ("img", "image") if name in table.column_names), None)
        label = next((name for name in variant.label_columns if name in table.column_names), None)
        if column is None or label is None:
            raise UserError(f"{path}: needs columns img and {variant.label_columns[0]}, has {', '.join(table.column_names)}")
        rows, labels = table[column].to_pylist(), table[label].to_pylist()
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:  # two columns of one name, text that is not UTF-8
        raise UserError(f"{path}: damaged or incomplete Parquet file ({reason_of(error)})") from None
    items: list[Any] = [row.get("bytes") if isinstance(row, dict) else row for row in rows]
    for number, item in enumerate(items):
        if not isinstance(item, bytes):
            raise UserError(f"{path}: row {number} has no image bytes")
    return Encoded(items, [f"{path}: row {number}" for number in range(len(items))], labels, path)


# Folders of images, one for each class


def _read_folders(variant: Variant, folder: Path) -> Split:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    missing = [name for name in variant.spec.classes if not (folder / name).is_dir()]
    if missing:
        raise UserError(f"{folder}: no folder for class {missing[0]}")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(variant.spec.classes):
        images = [path for path in visible_entries(folder / name) if path.is_file()]
        paths += images
        labels += [label] * len(images)
        if not images:
            raise UserError(f"{folder / name}: contains no image")
    return [Encoded([path.read_bytes() for path in paths], [str(path) for path in paths], labels, folder)]

"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in every form that people have them in."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

from advmoe.config import DataConfig
from advmoe.data.archive import CHUNK, LIMITS, inside, tar_members
from advmoe.data.batch_pickle import uint8_array, unpickled
from advmoe.data.decode import JPEG_MAGIC, decode, decode_all
from advmoe.data.images import Images, ImageSpec, Splits, divided, from_arrays, in_content_order
from advmoe.data.place import place_of, readable, visible
from advmoe.errors import UserError
from advmoe.files import check_plain

SIZE = 32
MAX_BATCH = 2**29  # bytes: the largest of the two data sets' has 155 million
MOST_MEMBERS = 10_000  # of their archives, which have 9

Part = tuple[Images, bool]  # the images, and whether they had been JPEG


@dataclass(frozen=True)
class Variant:
    """What the two data sets differ in."""

    name: str
    title: str
    folder: str
    """Of the Python batches."""
    archive: str
    train: tuple[str, ...]
    """Names of the batches of the training part."""
    test: tuple[str, ...]
    batch_labels: bytes
    """Key of the labels in a batch."""
    label_columns: tuple[str, ...]
    """Names that the column of the labels may have in Parquet, the first one that is there counts."""
    spec: ImageSpec

    @property
    def forms(self) -> str:
        """What a place that holds the data set looks like."""
        return f"{self.folder} (folder), {self.archive}, train*.parquet and test*.parquet, or train/CLASS/ and test/CLASS/"


CIFAR10 = Variant(
    "cifar10", "CIFAR-10", "cifar-10-batches-py", "cifar-10-python.tar.gz",
    tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",), b"labels", ("label",),
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
    ("train",), ("test",), b"fine_labels", ("fine_label", "label"),
    ImageSpec(tuple(FINE_CLASSES.split()), (3, SIZE, SIZE), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
)  # fmt: skip


def load(variant: Variant, config: DataConfig) -> Splits:
    """The data set from `data_dir`; its name ends in -jpeg where images had been JPEG. CIFAR-100 with its fine labels.

    The order is that of the content, so every lossless form gives the same fingerprint and held-out part.
    Raises UserError, with the path and row, where something is missing or damaged.
    """
    with readable(config):
        place = place_of(config, variant.forms)
        parts = _read(variant, place)
    train, test = (in_content_order(images) for images, _ in parts)
    counts = torch.bincount(train.labels, minlength=len(variant.spec.classes))
    if not counts.all():  # such as superclasses, or the other data set, read as this one
        absent = int((counts == 0).nonzero()[0])
        raise UserError(f"{place}: no training image of class {absent} ({variant.spec.classes[absent]}) of {variant.title}")
    name = f"{variant.name}-jpeg" if any(was_jpeg for _, was_jpeg in parts) else variant.name
    return divided(name, variant.spec, train, test, config)


def _read(variant: Variant, place: Path) -> tuple[Part, Part]:
    if place.is_file() and place.suffix == ".parquet":
        raise UserError(f"{place}: is one file; give the folder that holds train*.parquet and test*.parquet")
    if place.is_file():
        return _read_tar(variant, place)
    for folder in (place, place / variant.folder):
        if any((folder / name).is_file() for name in (*variant.train, *variant.test)):
            return _read_batches(variant, folder)
    if (place / variant.archive).exists():
        return _read_tar(variant, place / variant.archive)
    if any(place.glob("**/*.parquet")):
        return _read_parquet(variant, place, "train"), _read_parquet(variant, place, "test")
    if (place / "train").is_dir():
        return _read_folders(variant, place / "train"), _read_folders(variant, place / "test")
    raise UserError(f"{place}: holds none of {variant.forms}")


# The Python batches, in a folder or in the tar.gz


def _read_batches(variant: Variant, folder: Path) -> tuple[Part, Part]:
    paths = {name: folder / name for name in (*variant.train, *variant.test)}
    return _by_part(variant, {name: _batch(variant, _content(path), str(path)) for name, path in paths.items()})


def _content(path: Path) -> bytes:
    check_plain(path, MAX_BATCH)
    return path.read_bytes()


def _read_tar(variant: Variant, path: Path) -> tuple[Part, Part]:
    try:
        batches = _tar_batches(variant, path)
    except (UserError, PermissionError):
        raise
    except Exception as error:  # a damaged archive raises nearly anything
        raise UserError(f"{path}: not a whole tar archive ({' '.join(str(error).split())[:120]})") from None
    for name in (*variant.train, *variant.test):
        if name not in batches:
            raise UserError(f"{path}: holds no file {variant.folder}/{name}")
    return _by_part(variant, batches)


def _tar_batches(variant: Variant, path: Path) -> dict[str, Images]:
    """The batches of an archive in one pass; members are read, never unpacked: nothing is written, wherever they point."""
    batches = {}
    with closing(tar_members(path, LIMITS)) as members:
        for number, member in enumerate(members):
            if number == MOST_MEMBERS:
                raise UserError(f"{path}: holds more than {MOST_MEMBERS} members, too many for {variant.title}")
            name = inside(member.name, f"{path}: member {member.name}").rpartition("/")[2]
            if member.content is not None and name in (*variant.train, *variant.test):
                if member.size > MAX_BATCH:
                    raise UserError(f"{path}: {name} has {member.size:,} bytes; at most {MAX_BATCH:,} are read")
                content = b"".join(iter(partial(member.content.read, CHUNK), b""))
                batches[name] = _batch(variant, content, f"{path}: {name}")
    return batches


def _by_part(variant: Variant, batches: Mapping[str, Images]) -> tuple[Part, Part]:
    train, test = (_join([batches[name] for name in names]) for names in (variant.train, variant.test))
    return (train, False), (test, False)


def _batch(variant: Variant, content: bytes, where: str) -> Images:
    try:
        batch = unpickled(content)
        raw = uint8_array(batch[b"data"]).reshape(-1, 3, SIZE, SIZE)
        labels = batch[variant.batch_labels]
        if not isinstance(labels, list):
            raise TypeError(f"labels of type {type(labels).__name__}, not list")
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(f"{where}: not a {variant.title} batch ({reason})") from None
    return from_arrays(raw, labels, len(variant.spec.classes), where)


def _join(parts: Sequence[Images]) -> Images:
    return Images(torch.cat([part.raw for part in parts]), torch.cat([part.labels for part in parts]))


# Parquet


def _read_parquet(variant: Variant, place: Path, part: str) -> Part:
    paths = sorted(path for path in place.glob("**/*.parquet") if path.name.startswith(part))
    if not paths:
        raise UserError(f"{place}: holds no {part}*.parquet")
    parts = [_parquet_file(variant, path) for path in paths]
    return _join([images for images, _ in parts]), any(was_jpeg for _, was_jpeg in parts)


def _parquet_file(variant: Variant, path: Path) -> Part:
    try:
        table = pyarrow.parquet.read_table(path, partitioning=None)
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole Parquet file ({' '.join(str(error).split())[:120]})") from None
    column = next((name for name in ("img", "image") if name in table.column_names), None)
    label = next((name for name in variant.label_columns if name in table.column_names), None)
    if column is None or label is None:
        raise UserError(f"{path}: needs columns img and {variant.label_columns[0]}, has {', '.join(table.column_names)}")
    rows = table[column].to_pylist()
    items: list[Any] = [row.get("bytes") if isinstance(row, dict) else row for row in rows]
    for number, item in enumerate(items):
        if not isinstance(item, bytes):
            raise UserError(f"{path}: row {number} holds no image bytes")
    return _decoded(variant, items, [f"{path}: row {number}" for number in range(len(items))], table[label].to_pylist(), path)


# Folders of images by class


def _read_folders(variant: Variant, folder: Path) -> Part:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    missing = [name for name in variant.spec.classes if not (folder / name).is_dir()]
    if missing:
        raise UserError(f"{folder}: no folder for class {missing[0]}")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(variant.spec.classes):
        found = [path for path in visible(folder / name) if path.is_file()]
        paths += found
        labels += [label] * len(found)
        if not found:
            raise UserError(f"{folder / name}: holds no image")
    return _decoded(variant, [path.read_bytes() for path in paths], [str(path) for path in paths], labels, folder)


def _decoded(variant: Variant, items: Sequence[bytes], names: Sequence[str], labels: Sequence[int], place: Path) -> Part:
    raw = decode_all(len(items), SIZE, lambda row: decode(items[row], SIZE, names[row]))
    images = from_arrays(raw, labels, len(variant.spec.classes), str(place))
    return images, any(item.startswith(JPEG_MAGIC) for item in items)

"""Images in memory, and the splits of a data set: what a data source returns and a training loop takes."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from pydantic import AfterValidator, TypeAdapter, ValidationError
from torch import Tensor

from advmoe import distributed
from advmoe.config import DataConfig
from advmoe.data.augment import AUGMENTATIONS, augmentation_draws
from advmoe.errors import UserError
from advmoe.moved import getter

MAX_SIDE = 2**16  # of an image
SPLIT_SEED = 20230827  # for the validation split and limited subsets, which do not depend on the run's seed


class Source(Protocol):
    """One split of a data set, in memory (Images) or on disk (Streamed)."""

    @property
    def labels(self) -> Tensor:
        """[n] int64, on the device that the images are moved to."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> "Images":
        """The images of some rows, as they are evaluated."""

    def subset(self, index: Tensor) -> Self:
        """A smaller split, by row numbers or a boolean mask. Cheap: nothing is decoded."""

    def to(self, device: torch.device) -> Self:
        """The same images on `device`."""

    def pixels(self) -> Tensor:
        """All images as float32 in [0, 1], [n, C, H, W]."""

    def augmented(self, rows: Sequence[np.ndarray], seeds: Sequence[int], data: DataConfig) -> Iterator["Images"]:
        """This rank's share of each training batch; `rows` has the row numbers of each batch, `seeds` one seed for each.

        The augmentation of an image depends on the seed and the image's position in the batch only.
        """


SplitSource = TypeVar("SplitSource", bound=Source)


@dataclass(frozen=True, eq=False)
class Images:
    """`raw` [n, C, H, W] uint8 and `labels` [n] int64, on one device.

    `rows` [n] int64, in a training batch: the numbers of the images in their split; None if they are not known.
    """

    raw: Tensor
    labels: Tensor
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Images":
        return Images(self.raw[index], self.labels[index])

    def subset(self, index: Tensor) -> "Images":
        """The same as indexing, by row numbers or a boolean mask."""
        return self[index]

    def to(self, device: torch.device) -> "Images":
        """The same images on `device`."""
        return Images(self.raw.to(device), self.labels.to(device))

    def pixels(self) -> Tensor:
        """The images as float32 in [0, 1]."""
        return self.raw.float().div_(255)

    def batch(self, rows: Tensor, local: slice, seed: int) -> "Images":
        """The images of the rows `local` of a batch, before they are augmented."""
        return replace(self[rows[local]], rows=rows[local])

    def augmented(self, rows: Sequence[np.ndarray], seeds: Sequence[int], data: DataConfig) -> Iterator["Images"]:
        """Batches changed at random by the augmentation that `data` names, drawn on the images' device."""
        generator, augmentation = torch.Generator(self.labels.device), AUGMENTATIONS[data.augment]
        all_rows = torch.from_numpy(np.concatenate(rows)).to(self.labels.device)  # in one copy: each waits for the device
        for batch_rows, seed in zip(all_rows.split([len(batch) for batch in rows]), seeds, strict=True):
            share = distributed.local_rows(len(batch_rows))
            draws = augmentation_draws(len(batch_rows), generator.manual_seed(seed), augmentation.count)
            batch = self.batch(batch_rows, share, seed)
            yield Images(augmentation.apply(batch.raw, data, draws[:, share]), batch.labels, batch.rows)


@dataclass(frozen=True)
class ImageSpec:
    """What a network must know about its images: class names, shape (C, H, W), and each channel's mean and std in [0, 1]."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _check_spec(spec: ImageSpec) -> ImageSpec:
    if not len(spec.mean) == len(spec.std) == spec.shape[0]:
        raise ValueError(f"mean and std must have one value for each of the {spec.shape[0]} channels")
    if not all(0 < side <= MAX_SIDE for side in spec.shape):
        raise ValueError(f"shape must have sides from 1 to {MAX_SIDE}, not {spec.shape}")
    if not all(abs(value) <= MAX_SIDE for value in (*spec.mean, *spec.std)) or 0 in spec.std:
        raise ValueError(f"mean {spec.mean} and std {spec.std} must be at most {MAX_SIDE}, and std not 0")
    if not spec.classes:
        raise ValueError("classes must have a name or more")
    return spec


Spec = Annotated[ImageSpec, AfterValidator(_check_spec)]  # in a file


class Counts(NamedTuple):
    """The number of images in each split."""

    train: int
    val: int
    test: int


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set: `train` is for training, `val` selects the best epoch, results are reported on `test`."""

    name: str
    spec: ImageSpec
    fingerprint: str
    train: Source
    val: Source
    test: Source

    def to(self, device: torch.device) -> "Splits":
        """The same data with every image on `device`."""
        return Splits(self.name, self.spec, self.fingerprint, *(split.to(device) for split in (self.train, self.val, self.test)))


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def from_arrays(raw: np.ndarray, labels: Sequence[int] | np.ndarray, num_classes: int, where: str) -> Images:
    """Checked Images from [n, C, H, W] uint8 and n labels. Raises UserError, which starts with `where`."""
    if len(raw) == 0 or len(raw) != len(labels):
        raise UserError(f"{where}: {len(raw)} images and {len(labels)} labels")
    for row, label in enumerate(labels.tolist() if isinstance(labels, np.ndarray) else labels):
        if type(label) is not int or not 0 <= label < num_classes:
            raise UserError(f"{where}: label {label!r} in row {row} is not a whole number from 0 to {num_classes - 1}")
    return Images(torch.from_numpy(np.ascontiguousarray(raw)), torch.from_numpy(np.array(labels, dtype=np.int64)))


def images_of_arrays(images: np.ndarray, labels: np.ndarray, spec: ImageSpec, where: str, where_labels: str) -> Images:
    """Checked Images from an array [n, H, W, C], [n, C, H, W] or [n, C * H * W] of uint8, and integers [n] or [n, 1].

    Raises UserError, which starts with `where` or `where_labels`, if the arrays have other shapes or types.
    """
    channels, height, width = spec.shape
    shapes = [(height, width, channels), spec.shape, (channels * height * width,)]
    if images.dtype != np.uint8 or images.shape[1:] not in shapes:
        raise UserError(
            f"{where}: {images.dtype} of shape {images.shape}; needed is uint8 of shape (n, {height}, {width}, {channels}), "
            f"(n, {channels}, {height}, {width}) or (n, {channels * height * width})"
        )
    if labels.dtype.kind not in "ui" or labels.shape not in ((labels.size,), (labels.size, 1)):
        raise UserError(f"{where_labels}: {labels.dtype} of shape {labels.shape}; needed are integers of shape (n,)")
    raw = images.transpose(0, 3, 1, 2) if images.shape[1:] == shapes[0] else images.reshape(-1, *spec.shape)
    return from_arrays(raw.copy(), labels.reshape(-1), len(spec.classes), where)


def only_labels(labels: Sequence[int], num_classes: int, where: str) -> Images:
    """Checked Images without pixels: for counting images that are not decoded. Raises UserError, which starts with `where`."""
    return from_arrays(np.empty((len(labels), 0, 0, 0), dtype=np.uint8), labels, num_classes, where)


def in_content_order(images: Images) -> Images:
    """The same images sorted by a hash of pixels and label, so that the order of the files does not matter."""
    rows = zip(images.raw.numpy(), images.labels.tolist(), strict=True)
    keys = [hashlib.sha256(image.tobytes() + label.to_bytes(8, "little")).digest() for image, label in rows]
    return images[torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))]


def fingerprint(*splits: Images) -> str:
    """SHA-256 of the shapes, pixels and labels of the splits, in order."""
    digest = hashlib.sha256()
    for images in splits:
        digest.update(repr(tuple(images.raw.shape)).encode())
        digest.update(images.raw.numpy().tobytes())
        digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()


def balanced(labels: Tensor, count: int) -> Tensor:
    """Sorted indices of `count` rows (of all, if there are fewer), balanced over the classes; the same at every call."""
    classes, rank = labels.numpy(), _rank_in_class(labels)
    return torch.from_numpy(np.sort(np.lexsort((classes, rank))[:count]))


def _rank_in_class(labels: Tensor) -> np.ndarray:
    """For each row, its position among the rows of its class in a fixed random order."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    by_class = order[np.argsort(labels.numpy()[order], kind="stable")]
    counts = np.unique(labels.numpy(), return_counts=True)[1]
    rank = np.empty(len(order), dtype=np.int64)
    rank[by_class] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def hold_out(images: SplitSource, share: float) -> tuple[SplitSource, SplitSource]:
    """(remaining, held out): the same `share` of each class in every run, at least one image of a class and never all.

    Raises UserError if a class has only one image.
    """
    counts = torch.bincount(images.labels).numpy()
    if 1 in counts:
        raise UserError(f"class {np.argmax(counts == 1)} has 1 training image: too few to hold one out for validation")
    quota = np.clip(np.rint(share * counts), 1, counts - 1)
    held_out = torch.from_numpy(_rank_in_class(images.labels) < quota[images.labels.numpy()])
    return images.subset(~held_out), images.subset(held_out)


def limit(images: SplitSource, count: int | None) -> SplitSource:
    """At most `count` images, balanced over the classes."""
    return images if count is None else images.subset(balanced(images.labels, count))


def check_source(source: Source, spec: ImageSpec, where: str) -> None:
    """Raises UserError, which starts with `where`, if the labels of a split or its images in memory do not fit `spec`."""
    labels, classes = source.labels, len(spec.classes)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1 or not len(labels):
        raise UserError(f"{where}: labels must be a tensor of int64, [n] with n > 0, not {_shape_and_type(labels)}")
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        row = int(wrong.int().argmax())
        raise UserError(f"{where}: label {int(labels[row])} in row {row} is not a whole number from 0 to {classes - 1}")
    if isinstance(source, Images):
        raw, expected = source.raw, (len(labels), *spec.shape)
        if not isinstance(raw, Tensor) or raw.dtype != torch.uint8 or raw.shape != expected:
            needed = f"a tensor of uint8 (0 to 255), {list(expected)}"
            raise UserError(f"{where}: images must be {needed}, not {_shape_and_type(raw)}")


def _shape_and_type(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}, {list(value.shape)}"
    return f"a {type(value).__name__}"


def check_splits(splits: Splits, where: str) -> None:
    """Raises UserError, which starts with `where`, if no file could hold their ImageSpec, or if the splits do not fit it."""
    try:
        TypeAdapter(Spec).validate_json(json.dumps(asdict(splits.spec)), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        name = ".".join(map(str, ("ImageSpec", *details["loc"])))
        raise UserError(f"{where}, {name}: {details['msg'].removeprefix('Value error, ')}") from None
    except TypeError as error:  # of json: a tensor, or a number of numpy
        raise UserError(f"{where}, ImageSpec: must hold plain numbers and strings ({error})") from None
    for name, source in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        check_source(source, splits.spec, f"{where}, {name}")


def make_splits(name: str, spec: ImageSpec, train: Images, test: Images, config: DataConfig) -> Splits:
    """The splits of a source that has no validation split: it is held out of `train`. All are limited as `config` says.

    Raises UserError if images or labels do not fit `spec`, or if a class has only one training image.
    """
    for part, images in (("train", train), ("test", test)):
        check_source(images, spec, f"{name}, {part}")
    return Splits(name, spec, fingerprint(train, test), *train_val_test(train, test, len(spec.classes), config))


def count_splits(train: Images, test: Images, num_classes: int, config: DataConfig) -> Counts:
    """The sizes of the splits that `make_splits` makes. Pixels do not matter."""
    return Counts(*map(len, train_val_test(train, test, num_classes, config)))


def train_val_test(
    train: SplitSource, test: SplitSource, num_classes: int, config: DataConfig
) -> tuple[SplitSource, SplitSource, SplitSource]:
    """`train` without its held-out images, the held-out images, and `test`, limited as `config` says."""
    remaining, val = hold_out(train, config.validation_share)
    if config.limit_train is not None:
        val = limit(val, max(config.limit_train // 10, num_classes))
    return limit(remaining, config.limit_train), val, limit(test, config.limit_test)


if not TYPE_CHECKING:
    __getattr__ = getter(__name__)

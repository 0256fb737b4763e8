"""Images in memory: what a data source gives and a training loop takes."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from advmoe import distributed
from advmoe.config import DataConfig
from advmoe.data.augment import augment, drawn
from advmoe.errors import UserError

SPLIT_SEED = 20230827  # of the held-out part and of limited subsets: the same images whatever the run's seed


class Source(Protocol):
    """One part of a data set, in memory (Images) or on disk (Streamed)."""

    @property
    def labels(self) -> Tensor:
        """[n] int64, on the device that the images come to."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> "Images":
        """The images of some rows, as they are evaluated."""

    def subset(self, index: Tensor) -> Self:
        """Some rows as a part of their own, by numbers or flags; cheap, nothing is decoded."""

    def to(self, device: torch.device) -> Self:
        """The same images on `device`."""

    def pixels(self) -> Tensor:
        """All images as float32 in [0, 1], [n, C, H, W]."""

    def augmented(self, rows: Sequence[np.ndarray], seeds: Sequence[int], data: DataConfig) -> Iterator["Images"]:
        """This rank's shares of training batches of the given rows, one for each seed; an image's augmentation is a function
        of that seed and the image's place in the batch."""


Part = TypeVar("Part", bound=Source)


@dataclass(frozen=True, eq=False)
class Images:
    """`images` [n, C, H, W] uint8 and `labels` [n] int64, on one device."""

    raw: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Images":
        return Images(self.raw[index], self.labels[index])

    def subset(self, index: Tensor) -> "Images":
        """The same as indexing: rows by numbers or flags."""
        return self[index]

    def to(self, device: torch.device) -> "Images":
        """The same images on `device`."""
        return Images(self.raw.to(device), self.labels.to(device))

    def pixels(self) -> Tensor:
        """Images as float32 in [0, 1]."""
        return self.raw.float().div_(255)

    def augmented(self, rows: Sequence[np.ndarray], seeds: Sequence[int], data: DataConfig) -> Iterator["Images"]:
        """Batches with random crops after padding and random mirroring, drawn on the images' device."""
        generator = torch.Generator(self.labels.device)
        whole = torch.from_numpy(np.concatenate(rows)).to(self.labels.device)  # once: each copy waits for the device
        for chosen, seed in zip(whole.split([len(batch) for batch in rows]), seeds, strict=True):
            own, draws = distributed.local_rows(len(chosen)), drawn(len(chosen), generator.manual_seed(seed))
            batch = self[chosen[own]]
            yield Images(augment(batch.raw, data.crop_padding, data.flip, draws[:, own]), batch.labels)


@dataclass(frozen=True)
class ImageSpec:
    """What a network must know of its images: class names, (C, H, W), mean and std of each channel in [0, 1]."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set ready for use: what is trained on, what selects the best epoch, what is reported."""

    name: str
    spec: ImageSpec
    fingerprint: str
    train: Source
    val: Source
    test: Source

    def to(self, device: torch.device) -> "Splits":
        """The same data with every image on `device`."""
        return Splits(self.name, self.spec, self.fingerprint, *(part.to(device) for part in (self.train, self.val, self.test)))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def from_arrays(raw: np.ndarray, labels: Sequence[int] | np.ndarray, num_classes: int, where: str) -> Images:
    """Checked Images from [n, C, H, W] uint8 and n labels. Raises UserError, led by `where`."""
    if len(raw) == 0 or len(raw) != len(labels):
        raise UserError(f"{where}: {len(raw)} images and {len(labels)} labels")
    for row, label in enumerate(labels.tolist() if isinstance(labels, np.ndarray) else labels):
        if type(label) is not int or not 0 <= label < num_classes:
            raise UserError(f"{where}: label {label!r} in row {row} is not a whole number from 0 to {num_classes - 1}")
    return Images(torch.from_numpy(np.ascontiguousarray(raw)), torch.from_numpy(np.array(labels, dtype=np.int64)))


def in_content_order(images: Images) -> Images:
    """The same images sorted by a hash of pixels and label: one order, whatever the order of the source."""
    rows = zip(images.raw.numpy(), images.labels.tolist(), strict=True)
    keys = [hashlib.sha256(image.tobytes() + label.to_bytes(8, "little")).digest() for image, label in rows]
    return images[torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))]


def fingerprint(*parts: Images) -> str:
    """SHA-256 over shapes, pixels and labels of the parts, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(tuple(part.raw.shape)).encode())
        digest.update(part.raw.numpy().tobytes())
        digest.update(part.labels.numpy().tobytes())
    return digest.hexdigest()


def balanced(labels: Tensor, count: int) -> Tensor:
    """Sorted indices of `count` rows (all, if there are fewer), as many of each class as `count` allows; always the same."""
    classes, rank = labels.numpy(), _rank_in_class(labels)
    return torch.from_numpy(np.sort(np.lexsort((classes, rank))[:count]))


def _rank_in_class(labels: Tensor) -> np.ndarray:
    """For each row, how many of its class come before it in a fixed random order."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    by_class = order[np.argsort(labels.numpy()[order], kind="stable")]
    counts = np.unique(labels.numpy(), return_counts=True)[1]
    rank = np.empty(len(order), dtype=np.int64)
    rank[by_class] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def hold_out(images: Part, share: float) -> tuple[Part, Part]:
    """(rest, held-out part): the same `share` of each class for every run, at least one image and never all.

    Raises UserError where a class has only one image.
    """
    counts = torch.bincount(images.labels).numpy()
    if 1 in counts:
        raise UserError(f"class {np.argmax(counts == 1)} has 1 training image: too few to hold one out for validation")
    quota = np.clip(np.rint(share * counts), 1, counts - 1)
    held = torch.from_numpy(_rank_in_class(images.labels) < quota[images.labels.numpy()])
    return images.subset(~held), images.subset(held)


def limit(images: Part, count: int | None) -> Part:
    """At most `count` images, balanced over the classes."""
    return images if count is None else images.subset(balanced(images.labels, count))


def divided(name: str, spec: ImageSpec, train: Images, test: Images, config: DataConfig) -> Splits:
    """Splits of a source that has no validation part: it is held out of `train`. All are limited as `config` says."""
    return Splits(name, spec, fingerprint(train, test), *parts(train, test, len(spec.classes), config))


def parts(train: Part, test: Part, num_classes: int, config: DataConfig) -> tuple[Part, Part, Part]:
    """What is trained on, what is held out of `train` to select the best epoch, what is reported: limited as `config` says."""
    rest, val = hold_out(train, config.validation_share)
    if config.limit_train is not None:
        val = limit(val, max(config.limit_train // 10, num_classes))
    return limit(rest, config.limit_train), val, limit(test, config.limit_test)

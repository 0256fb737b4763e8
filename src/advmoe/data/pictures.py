"""Pictures in memory: what a data source gives and a training loop takes."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from advmoe import ranks
from advmoe.config import DataConfig
from advmoe.data.augment import augment, drawn
from advmoe.errors import UserError

SPLIT_SEED = 20230827  # of the held-out part and of limited subsets: the same pictures whatever the run's seed


class Source(Protocol):
    """One part of a data set, in memory (Pictures) or on disk (Streamed)."""

    @property
    def labels(self) -> Tensor:
        """[n] int64, on the device that the pictures come to."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> "Pictures":
        """The pictures of some rows, as they are evaluated."""

    def subset(self, index: Tensor) -> Self:
        """Some rows as a part of their own, by numbers or flags; cheap, nothing is decoded."""

    def to(self, device: torch.device) -> Self:
        """The same pictures on `device`."""

    def pixels(self) -> Tensor:
        """All images as float32 in [0, 1], [n, C, H, W]."""

    def augmented(self, rows: Sequence[np.ndarray], seeds: Sequence[int], data: DataConfig) -> Iterator["Pictures"]:
        """This rank's shares of training batches of the given rows, one for each seed; a picture's augmentation is a function
        of that seed and the picture's place in the batch."""


Part = TypeVar("Part", bound=Source)


@dataclass(frozen=True, eq=False)
class Pictures:
    """`images` [n, C, H, W] uint8 and `labels` [n] int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Pictures":
        return Pictures(self.images[index], self.labels[index])

    def subset(self, index: Tensor) -> "Pictures":
        """The same as indexing: rows by numbers or flags."""
        return self[index]

    def to(self, device: torch.device) -> "Pictures":
        """The same pictures on `device`."""
        return Pictures(self.images.to(device), self.labels.to(device))

    def pixels(self) -> Tensor:
        """Images as float32 in [0, 1]."""
        return self.images.float().div_(255)

    def augmented(self, rows: Sequence[np.ndarray], seeds: Sequence[int], data: DataConfig) -> Iterator["Pictures"]:
        """Batches with random crops after padding and random mirroring, drawn on the pictures' device."""
        generator = torch.Generator(self.labels.device)
        whole = torch.from_numpy(np.concatenate(rows)).to(self.labels.device)  # once: each copy waits for the device
        for chosen, seed in zip(whole.split([len(batch) for batch in rows]), seeds, strict=True):
            own, draws = ranks.share(len(chosen)), drawn(len(chosen), generator.manual_seed(seed))
            batch = self[chosen[own]]
            yield Pictures(augment(batch.images, data.crop_padding, data.flip, draws[:, own]), batch.labels)


@dataclass(frozen=True)
class PictureSpec:
    """What a network must know of its pictures: class names, (C, H, W), mean and std of each channel in [0, 1]."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set ready for use: what is trained on, what selects the best epoch, what is reported."""

    name: str
    spec: PictureSpec
    fingerprint: str
    train: Source
    val: Source
    test: Source

    def to(self, device: torch.device) -> "Splits":
        """The same data with every picture on `device`."""
        return Splits(self.name, self.spec, self.fingerprint, *(part.to(device) for part in (self.train, self.val, self.test)))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def from_arrays(images: np.ndarray, labels: Sequence[int] | np.ndarray, num_classes: int, where: str) -> Pictures:
    """Checked Pictures from [n, C, H, W] uint8 and n labels. Raises UserError, led by `where`."""
    if len(images) == 0 or len(images) != len(labels):
        raise UserError(f"{where}: {len(images)} pictures and {len(labels)} labels")
    for row, label in enumerate(labels.tolist() if isinstance(labels, np.ndarray) else labels):
        if type(label) is not int or not 0 <= label < num_classes:
            raise UserError(f"{where}: label {label!r} in row {row} is not a whole number from 0 to {num_classes - 1}")
    return Pictures(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(np.array(labels, dtype=np.int64)))


def in_content_order(pictures: Pictures) -> Pictures:
    """The same pictures sorted by a hash of pixels and label: one order, whatever the order of the source."""
    rows = zip(pictures.images.numpy(), pictures.labels.tolist(), strict=True)
    keys = [hashlib.sha256(image.tobytes() + label.to_bytes(8, "little")).digest() for image, label in rows]
    return pictures[torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))]


def fingerprint(*parts: Pictures) -> str:
    """SHA-256 over shapes, pixels and labels of the parts, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(tuple(part.images.shape)).encode())
        digest.update(part.images.numpy().tobytes())
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


def hold_out(pictures: Part, share: float) -> tuple[Part, Part]:
    """(rest, held-out part): the same `share` of each class for every run, at least one picture and never all.

    Raises UserError where a class has only one picture.
    """
    counts = torch.bincount(pictures.labels).numpy()
    if 1 in counts:
        raise UserError(f"class {np.argmax(counts == 1)} has 1 training picture: too few to hold one out for validation")
    quota = np.clip(np.rint(share * counts), 1, counts - 1)
    held = torch.from_numpy(_rank_in_class(pictures.labels) < quota[pictures.labels.numpy()])
    return pictures.subset(~held), pictures.subset(held)


def limit(pictures: Part, count: int | None) -> Part:
    """At most `count` pictures, balanced over the classes."""
    return pictures if count is None else pictures.subset(balanced(pictures.labels, count))


def divided(name: str, spec: PictureSpec, train: Pictures, test: Pictures, config: DataConfig) -> Splits:
    """Splits of a source that has no validation part: it is held out of `train`. All are limited as `config` says."""
    return Splits(name, spec, fingerprint(train, test), *parts(train, test, len(spec.classes), config))


def parts(train: Part, test: Part, num_classes: int, config: DataConfig) -> tuple[Part, Part, Part]:
    """What is trained on, what is held out of `train` to select the best epoch, what is reported: limited as `config` says."""
    rest, val = hold_out(train, config.validation_share)
    if config.limit_train is not None:
        val = limit(val, max(config.limit_train // 10, num_classes))
    return limit(rest, config.limit_train), val, limit(test, config.limit_test)

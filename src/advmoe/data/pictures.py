"""Pictures in memory: what a data source gives and a training loop takes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from advmoe.errors import UserError

SPLIT_SEED = 20230827  # of the held-out part and of limited subsets: the same pictures whatever the run's seed


@dataclass(frozen=True, eq=False)
class Pictures:
    """`images` [n, C, H, W] uint8 and `labels` [n] int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Pictures":
        return Pictures(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "Pictures":
        """The same pictures on `device`."""
        return Pictures(self.images.to(device), self.labels.to(device))

    def pixels(self) -> Tensor:
        """Images as float32 in [0, 1]."""
        return self.images.float() / 255


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
    train: Pictures
    val: Pictures
    test: Pictures

    def to(self, device: torch.device) -> "Splits":
        """The same data with every picture on `device`."""
        return Splits(self.name, self.spec, self.fingerprint, *(part.to(device) for part in (self.train, self.val, self.test)))


def from_arrays(images: np.ndarray, labels: Sequence[int] | np.ndarray, num_classes: int, where: str) -> Pictures:
    """Checked Pictures from [n, C, H, W] uint8 and n labels. Raises UserError, led by `where`."""
    numbers = np.asarray(labels, dtype=np.int64)
    if len(images) == 0 or len(images) != len(numbers):
        raise UserError(f"{where}: {len(images)} pictures and {len(numbers)} labels")
    if numbers.min() < 0 or numbers.max() >= num_classes:
        row = int(np.argmax((numbers < 0) | (numbers >= num_classes)))
        raise UserError(f"{where}: label {numbers[row]} in row {row} is outside 0 to {num_classes - 1}")
    return Pictures(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(numbers))


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
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(labels)))
    shuffled = labels[order].numpy()
    rank = np.empty(len(shuffled), dtype=np.int64)  # how many of the row's class come before it
    for number in np.unique(shuffled):
        rows = np.flatnonzero(shuffled == number)
        rank[rows] = np.arange(len(rows))
    first = np.lexsort((shuffled, rank))[:count]
    return order[torch.from_numpy(first)].sort().values


def hold_out(pictures: Pictures, share: float) -> tuple[Pictures, Pictures]:
    """(rest, held-out part): the same stratified `share` of the pictures for every run, at least one of each class."""
    classes = len(torch.unique(pictures.labels))
    count = max(round(share * len(pictures)), classes)
    if count >= len(pictures):
        raise UserError(f"{len(pictures)} training pictures are too few to hold out {count} for validation")
    held = balanced(pictures.labels, count)
    rest = torch.ones(len(pictures), dtype=torch.bool)
    rest[held] = False
    return pictures[rest], pictures[held]


def limit(pictures: Pictures, count: int | None) -> Pictures:
    """At most `count` pictures, balanced over the classes."""
    return pictures if count is None else pictures[balanced(pictures.labels, count)]

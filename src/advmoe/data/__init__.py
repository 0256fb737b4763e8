"""The data sets, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from advmoe.config import DataConfig
from advmoe.data import cifar, fashion_mnist, folder, imagenet, tiny_imagenet
from advmoe.data.augment import augment
from advmoe.data.generated import with_generated
from advmoe.data.images import Counts, Images, ImageSpec, Source, Splits, check_splits, cores
from advmoe.entries import Entries, check_accepts, check_kind
from advmoe.errors import lookup
from advmoe.moved import getter


@dataclass(frozen=True)
class Dataset:
    """A data set: `spec` describes its images, `load` reads them; both give the same ImageSpec. `count` counts them without
    decoding them; it is None if `load` does not decode them either."""

    spec: Callable[[DataConfig], ImageSpec]
    load: Callable[[DataConfig], Splits]
    count: Callable[[DataConfig], Counts] | None = None


DATASETS = Entries({
    "fashion-mnist": Dataset(lambda _: fashion_mnist.SPEC, fashion_mnist.load),
    "cifar10": Dataset(lambda _: cifar.CIFAR10.spec, partial(cifar.load, cifar.CIFAR10), partial(cifar.count, cifar.CIFAR10)),
    "cifar100": Dataset(lambda _: cifar.CIFAR100.spec, partial(cifar.load, cifar.CIFAR100), partial(cifar.count, cifar.CIFAR100)),
    "tinyimagenet": Dataset(tiny_imagenet.spec, tiny_imagenet.load, tiny_imagenet.count),
    "imagenet": Dataset(imagenet.spec, imagenet.load),
    "folder": Dataset(folder.spec, folder.load, folder.count),
})  # fmt: skip


def lookup_dataset(name: str) -> Dataset:
    """The entry of DATASETS. Raises UserError if there is none, or if a user's entry is not a Dataset of two functions."""
    entry, what = lookup(DATASETS, name, "dataset"), f"dataset '{name}'"
    check_kind(what, entry, Dataset)
    check_accepts(f"{what}: spec", entry.spec, "config")
    check_accepts(f"{what}: load", entry.load, "config")
    return entry


def load_dataset(config: DataConfig) -> Splits:
    """The data set that `config` names, in main memory (ImageNet stays on disk).

    Raises UserError if the name is unknown, if the data cannot be read, or if images or labels do not fit the ImageSpec.
    """
    splits = lookup_dataset(config.dataset).load(config)
    check_kind(f"dataset '{config.dataset}': the result of load", splits, Splits)
    check_splits(splits, f"dataset '{config.dataset}'")
    return splits


def count_images(config: DataConfig) -> Counts:
    """The sizes of the splits that `load_dataset` returns, without decoding images.

    Raises UserError as `load_dataset`, but not for images that cannot be decoded.
    """
    dataset = lookup_dataset(config.dataset)
    if dataset.count is not None:
        return dataset.count(config)
    splits = dataset.load(config)
    return Counts(len(splits.train), len(splits.val), len(splits.test))


__all__ = [
    "DATASETS",
    "Counts",
    "Dataset",
    "ImageSpec",
    "Images",
    "Source",
    "Splits",
    "augment",
    "cores",
    "count_images",
    "load_dataset",
    "lookup_dataset",
    "with_generated",
]

if not TYPE_CHECKING:
    __getattr__ = getter(__name__)

"""Data sets: name -> Splits."""

from collections.abc import Callable
from dataclasses import dataclass

from advmoe.config import DataConfig
from advmoe.data import cifar, fashion_mnist
from advmoe.data.augment import augment
from advmoe.data.pictures import Pictures, PictureSpec, Splits
from advmoe.errors import lookup


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set before it is read, and how to read it."""

    spec: PictureSpec
    load: Callable[[DataConfig], Splits]


DATASETS = {
    "fashion-mnist": Dataset(fashion_mnist.SPEC, fashion_mnist.load),
    "cifar10": Dataset(cifar.SPEC, cifar.load),
}


def load_dataset(config: DataConfig) -> Splits:
    """The data set that `config` names, in memory on the CPU. Raises UserError where it is unknown or unreadable."""
    return lookup(DATASETS, config.dataset, "dataset").load(config)


__all__ = ["DATASETS", "Dataset", "PictureSpec", "Pictures", "Splits", "augment", "load_dataset"]

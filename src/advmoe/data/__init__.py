"""The data sets, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from advmoe.config import DataConfig
from advmoe.data import cifar, fashion_mnist, folder, imagenet, tiny_imagenet
from advmoe.data.augment import augment
from advmoe.data.images import Images, ImageSpec, Source, Splits, cores
from advmoe.errors import lookup


@dataclass(frozen=True)
class Dataset:
    """A data set: `spec` says what its images look like, `load` reads them."""

    spec: Callable[[DataConfig], ImageSpec]
    load: Callable[[DataConfig], Splits]


DATASETS = {
    "fashion-mnist": Dataset(lambda _: fashion_mnist.SPEC, fashion_mnist.load),
    "cifar10": Dataset(lambda _: cifar.CIFAR10.spec, partial(cifar.load, cifar.CIFAR10)),
    "cifar100": Dataset(lambda _: cifar.CIFAR100.spec, partial(cifar.load, cifar.CIFAR100)),
    "tinyimagenet": Dataset(tiny_imagenet.spec, tiny_imagenet.load),
    "imagenet": Dataset(imagenet.spec, imagenet.load),
    "folder": Dataset(folder.spec, folder.load),
}


def load_dataset(config: DataConfig) -> Splits:
    """The data set that `config` names, in main memory (ImageNet stays on disk).

    Raises UserError if the name is unknown or the data cannot be read.
    """
    return lookup(DATASETS, config.dataset, "dataset").load(config)


__all__ = ["DATASETS", "Dataset", "ImageSpec", "Images", "Source", "Splits", "augment", "cores", "load_dataset"]

"""The embedded subset of Fashion-MNIST (Xiao et al. 2017; MIT licence, its notice is beside the file)."""

import logging
from importlib.resources import files

import numpy as np

from advmoe.config import DataConfig
from advmoe.data.images import Images, ImageSpec, Splits, fingerprint, from_arrays, limit

logger = logging.getLogger("advmoe")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SPEC = ImageSpec(CLASSES, (1, 28, 28), (0.2860,), (0.3530,))


def load(config: DataConfig) -> Splits:
    """The train, validation and test splits of the embedded subset; `validation_share` is not used, and `data_dir` neither, with a
    warning.

    With `limit_train`, the validation split has at most a quarter as many images, because it is attacked after every epoch.
    """
    if config.data_dir is not None:
        logger.warning("%s: is not read, because the images of fashion-mnist come with the package", config.data_dir)
    with files("advmoe.data").joinpath("embedded/fashion-mnist.npz").open("rb") as file, np.load(file) as arrays:
        train, val, test = (_split(arrays, name) for name in ("train", "val", "test"))
    val_count = None if config.limit_train is None else min(len(val), max(config.limit_train // 4, len(CLASSES)))
    return Splits(
        "fashion-mnist", SPEC, fingerprint(train, val, test),
        limit(train, config.limit_train), limit(val, val_count), limit(test, config.limit_test),
    )  # fmt: skip


def _split(arrays: "np.lib.npyio.NpzFile", name: str) -> Images:
    return from_arrays(arrays[f"{name}_images"][:, None], arrays[f"{name}_labels"], len(CLASSES), f"embedded {name} split")

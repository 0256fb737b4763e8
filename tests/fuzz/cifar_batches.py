"""The smallest CIFAR folders that can be read, in the form of Python batches."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def batch(labels: list[int], key: bytes) -> dict[bytes, Any]:
    """Plain images, each of one value that is its row's."""
    data = np.repeat(np.arange(len(labels), dtype=np.uint8)[:, None], 3072, axis=1)
    return {key: labels, b"data": data, b"filenames": ["a.png"]}


def _write(folder: Path, parts: dict[str, list[int]], key: bytes) -> None:
    folder.mkdir(parents=True)
    for name, labels in parts.items():
        (folder / name).write_bytes(pickle.dumps(batch(labels, key), protocol=2))


def cifar10(folder: Path) -> Path:
    """Two training images of every class; gives the batch that is tested most: the last that is read is the test batch."""
    parts = {f"data_batch_{number}": [2 * number - 2, 2 * number - 1] * 2 for number in range(1, 6)} | {"test_batch": [0]}
    _write(folder / "cifar-10-batches-py", parts, b"labels")
    return folder / "cifar-10-batches-py" / "data_batch_1"


def cifar100(folder: Path) -> Path:
    """Two training images of every class; gives the test batch, the smaller one."""
    _write(folder / "cifar-100-python", {"train": [*range(100)] * 2, "test": [0]}, b"fine_labels")
    return folder / "cifar-100-python" / "test"


WRITERS: dict[str, Callable[[Path], Path]] = {"cifar10": cifar10, "cifar100": cifar100}

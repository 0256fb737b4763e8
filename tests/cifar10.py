"""A tiny CIFAR-10 in every form that is read."""

from pathlib import Path
from typing import Any

import numpy as np
from cifar_files import Part, blocky, encoded, lossless, write_archive, write_class_folders, write_pickles, write_table

from advmoe.data.cifar import CIFAR10

CLASSES = CIFAR10.spec.classes
BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
TRAIN, TEST = blocky(10, 4, seed=1), blocky(10, 2, seed=2)
PARTS = {"train": TRAIN, "test": TEST}


def batch_content(part: Part) -> dict[bytes, Any]:
    return {b"batch_label": b"tiny", b"labels": part.labels, b"data": part.raw.reshape(-1, 3072), b"filenames": [b"a.png"]}


def write_batches(folder: Path) -> Path:
    contents = {"test_batch": batch_content(TEST), "batches.meta": {b"label_names": list(CLASSES)}}
    for number, name in enumerate(BATCHES):
        rows = slice(8 * number, 8 * number + 8)
        contents[name] = batch_content(Part(TRAIN.raw[rows], TRAIN.labels[rows]))
    return write_pickles(folder / "cifar-10-batches-py", contents)


def write_tar(folder: Path) -> Path:
    return write_archive(folder / "cifar-10-python.tar.gz", write_batches(folder))


def write_parquet(folder: Path, kind: str = "PNG") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        images = [{"bytes": encoded(image, kind), "path": f"{row}.png"} for row, image in enumerate(part.raw)]
        write_table(folder / f"{name}-00000-of-00001.parquet", img=images, label=part.labels)
    return folder


def write_folders(folder: Path, kind: str = "PNG") -> Path:
    return write_class_folders(folder, PARTS, CLASSES, kind)


LOSSLESS = lossless(write_batches, write_tar, write_parquet, write_folders)
LOSSLESS["parquet in a folder"] = lambda folder: write_parquet(folder / "plain_text").parent


def parquet_by_split(folder: Path) -> Path:
    """As the hub converts data sets, beside a file of no split."""
    for name in PARTS:
        (folder / "plain_text" / name).mkdir(parents=True)
        next(write_parquet(folder).glob(f"{name}-*")).rename(folder / "plain_text" / name / "0000.parquet")
    for path in folder.glob("*.parquet"):
        path.rename(folder / "training_noisy.parquet")
    return folder


def keras_archive(folder: Path) -> Path:
    return write_tar(folder).rename(folder / "cifar-10-batches-py.tar.gz").parent


def npz(folder: Path) -> Path:
    """As Keras gives them: channels last, labels in a column."""
    arrays = {f"x_{name}": part.raw.transpose(0, 2, 3, 1) for name, part in PARTS.items()}
    labels = {f"y_{name}": np.array(part.labels, np.uint8)[:, None] for name, part in PARTS.items()}
    np.savez_compressed(folder / "cifar10.npz", **arrays, **labels)
    return folder / "cifar10.npz"


def npy(folder: Path) -> Path:
    """Channels first in the training split, rows as in the batches in the test split."""
    for name, part in PARTS.items():
        np.save(folder / f"{name}_images.npy", part.raw if name == "train" else part.raw.reshape(-1, 3072))
        np.save(folder / f"{name}_labels.npy", np.array(part.labels))
    return folder


LOSSLESS |= {
    "parquet in a folder for each split": parquet_by_split, "Keras's archive": keras_archive, "npz": npz,
    "folder of npz": lambda folder: npz(folder).parent, "npy": npy,
}  # fmt: skip

"""Writers of tiny CIFAR data, shared by the tests of CIFAR-10 and CIFAR-100."""

import io
import pickle
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

Write = Callable[[Path], Path]  # a folder to write to -> where the data lie


class Part(NamedTuple):
    """Images [n, 3, 32, 32] uint8 and labels."""

    raw: np.ndarray
    labels: list[int]


def blocky(classes: int, each: int, seed: int) -> Part:
    """Blocky random images, `each` of every class, in random order."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(classes), each)).tolist()
    images = random.integers(0, 256, (len(labels), 3, 4, 4), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
    return Part(images, labels)


def encoded(image: np.ndarray, kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    converted = Image.fromarray(image.transpose(1, 2, 0)).convert(mode)
    converted = converted if size == (32, 32) else converted.resize(size)
    converted.save(buffer, kind, **({"quality": 75} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write_pickles(folder: Path, contents: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def write_archive(path: Path, batches: Path, mode: str = "w:gz") -> Path:
    """Move the folder of batches into a tar."""
    with tarfile.open(path, mode) as archive:
        archive.add(batches, batches.name)
    shutil.rmtree(batches)
    return path


def write_table(path: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def write_class_folders(folder: Path, parts: Mapping[str, Part], classes: tuple[str, ...], kind: str) -> Path:
    for name, part in parts.items():
        for row, (image, label) in enumerate(zip(*part, strict=True)):
            target = folder / name / classes[label]
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{row:03d}.{kind.lower()}").write_bytes(encoded(image, kind))
    return folder


def lossless(batches: Write, tar: Write, parquet: Write, folders: Write) -> dict[str, Write]:
    """The forms that keep every pixel, by name; batches and tar also inside a folder."""
    return {
        "batches": batches,
        "folder of batches": lambda folder: batches(folder).parent,
        "tar.gz": tar,
        "folder of tar.gz": lambda folder: tar(folder).parent,
        "parquet": parquet,
        "png folders": folders,
    }

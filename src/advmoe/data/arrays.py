"""Numpy's array files (.npy, .npz), read without pickles and never larger than the file says it is."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np

from advmoe.errors import UserError

MAGIC = b"\x93NUMPY"
MAX_BYTES = 2**29  # of one array; the images of a CIFAR training split have 154 million bytes


def parse_npy(content: bytes, where: str) -> np.ndarray:
    """The array in the content of an .npy file, without a copy. Raises UserError, which starts with `where`.

    The header is checked before anything is allocated: it may claim any shape.
    """
    try:
        stream = BytesIO(content)
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, by_columns, dtype = read_header[np.lib.format.read_magic(stream)[0]](stream)
    except Exception as error:  # a damaged header can raise nearly any exception
        raise UserError(f"{where}: not an array that can be read ({' '.join(str(error).split())[:120]})") from None
    if dtype.hasobject:
        raise UserError(f"{where}: not an array that can be read (it contains Python objects, which are not loaded)")
    size = math.prod(shape) * dtype.itemsize
    if size != len(content) - stream.tell():
        raise UserError(f"{where}: not an array that can be read ({len(content) - stream.tell()} bytes, {size} declared)")
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape, order="F" if by_columns else "C")


def read_npy(path: Path) -> np.ndarray:
    """The array in an .npy file. Raises UserError, which names the file, if it is damaged or too large."""
    with path.open("rb") as file:
        return parse_npy(_bounded(file, str(path)), str(path))


@contextmanager
def open_npz(path: Path) -> Iterator["ArrayArchive"]:
    """The arrays of an .npz file by name, each read when it is asked for. Raises UserError if the file is not a zip archive."""
    with path.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:  # a damaged archive can raise nearly any exception
            raise UserError(f"{path}: damaged or incomplete .npz file ({' '.join(str(error).split())[:120]})") from None
        yield ArrayArchive(path, archive)


class ArrayArchive:
    """The arrays of an .npz file. Raises UserError, which names the array, if one is damaged or too large."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.names = [name.removesuffix(".npy") for name in archive.namelist()]

    def __getitem__(self, name: str) -> np.ndarray:
        where = f"{self.path}: {name}"
        try:
            with self.archive.open(f"{name}.npy") as file:
                content = _bounded(file, where)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{where}: damaged in the .npz file ({' '.join(str(error).split())[:120]})") from None
        return parse_npy(content, where)


def _bounded(file: IO[bytes], where: str) -> bytes:
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"{where}: has more than {MAX_BYTES:,} bytes, the most that is read")
    return content

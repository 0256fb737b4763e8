"""Numpy's array files (.npy, .npz). They are read without pickles, and an array never takes more memory than its file has bytes."""

import math
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np

from advmoe.data.archive import MAX_FILE, open_zip, read_entry
from advmoe.errors import UserError, reason_of
from advmoe.files import check_plain

MAGIC = b"\x93NUMPY"
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of an entry of a zip; its last two numbers are the lengths of name and extra field
MAX_BYTES = 2**29  # of one array; the images of a CIFAR training split have 154 million bytes


def parse_npy(content: bytes, where: str) -> np.ndarray:
    """The array in the content of an .npy file, without a copy. Raises UserError, which starts with `where`.

    The header is checked before anything is allocated: it may claim any shape.
    """
    try:
        stream = BytesIO(content)
        shape, fortran_order, dtype = _header(stream)
    except Exception as error:  # a damaged header can raise nearly any exception
        raise UserError(f"{where}: not an array that can be read ({reason_of(error)})") from None
    if dtype.hasobject:
        raise UserError(f"{where}: not an array that can be read (it contains Python objects, which are not loaded)")
    size = math.prod(shape) * dtype.itemsize
    if size != len(content) - stream.tell():
        raise UserError(f"{where}: not an array that can be read ({len(content) - stream.tell()} bytes, {size} declared)")
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran_order else "C")


def read_npy(path: Path) -> np.ndarray:
    """The array in an .npy file. Raises UserError, which names the file, if it is damaged or too large."""
    check_plain(path, MAX_FILE)
    with path.open("rb") as file:
        return parse_npy(_bounded(file, str(path)), str(path))


@contextmanager
def open_npz(path: Path) -> Iterator["ArrayArchive"]:
    """The arrays of an .npz file by name, each read when it is asked for. Raises UserError if it is damaged or no .npz file."""
    with open_zip(path, ".npz file") as archive:
        yield ArrayArchive(path, archive)


class ArrayArchive:
    """The arrays of an .npz file. Raises UserError, which names the array, if one is damaged or too large."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.names = [name.removesuffix(".npy") for name in archive.namelist()]

    def check_contains(self, name: str) -> None:
        """Raises UserError if there is no such array."""
        if name not in self.names:
            raise UserError(f"{self.path}: contains no array '{name}', only {', '.join(self.names[:5]) or 'nothing'}")

    def __getitem__(self, name: str) -> np.ndarray:
        where = f"{self.path}: {name}"
        self.check_contains(name)
        return parse_npy(read_entry(self.archive, f"{name}.npy", where, MAX_BYTES), where)


def map_npz(path: Path, name: str) -> np.ndarray:
    """One array of an .npz file, mapped: its pages are read from the disk when they are used, and it cannot be written.

    numpy.load maps .npy files alone. An array that numpy.savez stores lies in the file as it is, so it can be mapped at its
    offset. Raises UserError, which names the array, if it is missing, compressed (as by numpy.savez_compressed) or damaged.
    """
    where = f"{path}: {name}"
    with open_npz(path) as arrays, path.open("rb") as file:
        arrays.check_contains(name)
        entry = arrays.archive.getinfo(f"{name}.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{where}: is compressed and cannot be mapped; write the file with numpy.savez")
        try:
            file.seek(entry.header_offset)
            *_, name_size, extra_size = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            start = file.seek(name_size + extra_size, 1)
            shape, fortran_order, dtype = _header(file)
            offset = file.tell()
        except Exception as error:  # a damaged header can raise nearly any exception
            raise UserError(f"{where}: damaged in the .npz file ({reason_of(error)})") from None
        size, stored = math.prod(shape) * dtype.itemsize, start + entry.file_size - offset
        if dtype.hasobject or size != stored or offset + size > path.stat().st_size:
            raise UserError(f"{where}: not an array that can be mapped ({stored} bytes, {size} declared)")
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns are contiguous, and type of an .npy file, which is read up to its first element."""
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    return read[np.lib.format.read_magic(file)[0]](file)


def _bounded(file: IO[bytes], where: str) -> bytes:
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"{where}: has more than {MAX_BYTES:,} bytes, the most that is read")
    return content

"""Data that is damaged or makes no sense, and the one line in which loading it fails."""

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from advmoe.config import DataConfig
from advmoe.data import load_dataset
from advmoe.errors import UserError


def complaint(place: Path | None, **fields: Any) -> str:
    """What loading says of the data at `place`; `fields` are the configuration's."""
    with pytest.raises(UserError) as caught:
        load_dataset(DataConfig(data_dir=None if place is None else str(place), **fields))
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


def cut(path: Path, size: float) -> Path:
    """Keep so many bytes of a file's beginning (int; from its end where negative), or that share of them (float)."""
    content = path.read_bytes()
    path.write_bytes(content[: size if isinstance(size, int) else int(size * len(content))])
    return path


def huge_png(width: int, height: int) -> bytes:
    """A small file that says it holds width x height pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")

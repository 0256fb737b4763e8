"""Damaged files, and the one-line error of loading them."""

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

from refusal import refusal

from advmoe.config import DataConfig
from advmoe.data import load_dataset


def error_line(path: Path | None, **fields: Any) -> str:
    """The error of loading the data at `path`; `fields` are the configuration's."""
    return refusal(load_dataset, DataConfig(data_dir=None if path is None else str(path), **fields))


def cut(path: Path, size: float) -> Path:
    """Keep `content[:size]` of a file (int), or this share of its bytes (float)."""
    content = path.read_bytes()
    path.write_bytes(content[: size if isinstance(size, int) else int(size * len(content))])
    return path


def flip_bit(path: Path, share: float) -> Path:
    """Flip one bit of a gzip file, after this share of its bytes, so that its content changes or cannot be unpacked.

    About one bit in 200 does neither: a reference to earlier bytes then points to others that are equal. It is passed over.
    """
    content = path.read_bytes()
    for position in range(int(share * len(content)), len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 4
        try:
            if gzip.decompress(flipped) == gzip.decompress(content):
                continue
        except (OSError, EOFError, zlib.error):
            pass
        path.write_bytes(flipped)
        return path
    raise AssertionError(f"{path}: no bit after {share} of the file matters")


def huge_png(width: int, height: int) -> bytes:
    """A small file whose header declares width x height pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")

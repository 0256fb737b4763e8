"""Valid images with metadata that cannot be read are loaded."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from advmoe.data.decode import decode_fitted, stored_size
from advmoe.data.single import read_image
from advmoe.data.stream import centre_crop, resized_crop
from advmoe.errors import UserError

PIXELS = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
EXIF = b"Exif\0\0"


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(*tags: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data of (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0") for tag, kind, count, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def turned(orientation: int) -> tuple[int, int, int, bytes]:
    return 0x112, 3, 1, struct.pack("<H", orientation)


def jpeg(content: bytes, marker: int = 0xE1) -> bytes:
    """A JPEG that begins with a segment of the given content."""
    data = encoded("JPEG")
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + data[2:]


def png(name: bytes, content: bytes, at: int = 33) -> bytes:
    """A PNG with a chunk of the given name, by default the first after the header; in front of the end with `at` -12."""
    data = encoded("PNG")
    return data[:at] + struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content)) + data[at:]


def raw_profile(content: str) -> bytes:
    texts = PngInfo()
    texts.add_text("Raw profile type exif", content)
    return encoded("PNG", pnginfo=texts)


LONG_TEXT = b"x\0\0" + zlib.compress(bytes(3_000_000))  # longer than the texts that Pillow reads
UNREADABLE = {
    "exif that is no TIFF": jpeg(EXIF + b"garbage!"),
    "orientation as text": jpeg(EXIF + tiff((0x112, 2, 2, b"6\0"))),
    "orientation 9": jpeg(EXIF + tiff(turned(9))),
    "rational over 0": jpeg(EXIF + tiff(turned(1), (0x11A, 10, 1, struct.pack("<I", 38))) + struct.pack("<ii", -1, 0)),
    "colour profile cut off": jpeg(b"ICC_PROFILE\0", 0xE2),
    "Adobe segment cut off": jpeg(b"Adobe\0", 0xEE),
    "eXIf that is no TIFF": png(b"eXIf", b"\0\x08\0\x02junk"),
    "profile that is no hex": raw_profile("\nexif\n      10\nzzzz"),
    "long text": png(b"zTXt", LONG_TEXT),
    "long text after the pixels": png(b"zTXt", LONG_TEXT, at=-12),
    "long colour profile": png(b"iCCP", LONG_TEXT),
    "gamma cut off": png(b"gAMA", b"\0"),
    "unknown packing of a text": png(b"zTXt", b"c\0\5abc"),
    "WEBP": encoded("WEBP", lossless=True, exif=EXIF + b"junk"),
}
EVERYWHERE: dict[str, Callable[[bytes, Path], np.ndarray]] = {
    "folder": lambda data, path: decode_fitted(data, 6, "here"),
    "predict": lambda data, path: read_image(path, (3, 8, 6)).pixels.numpy(),
    "stream": lambda data, path: resized_crop(data, centre_crop, "here", shrink=True),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_metadata_that_cannot_be_read_are_ignored(name: str, tmp_path: Path) -> None:
    data = UNREADABLE[name]
    plain = encoded(
        {b"\xff\xd8": "JPEG", b"\x89P": "PNG"}.get(data[:2], "WEBP"), **({"lossless": True} if data[:2] == b"RI" else {})
    )
    assert stored_size(data, "here") == (6, 8)
    for read in EVERYWHERE.values():
        (tmp_path / "x").write_bytes(plain)
        expected = read(plain, tmp_path / "x")
        (tmp_path / "x").write_bytes(data)
        assert np.array_equal(read(data, tmp_path / "x"), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright_beside_metadata_that_cannot_be_read(orientation: int, tmp_path: Path) -> None:
    data = png(b"eXIf", tiff(turned(orientation)))
    data = data[:33] + png(b"zTXt", LONG_TEXT)[33 : -len(encoded("PNG")) + 33] + data[33:]
    (tmp_path / "x.png").write_bytes(data)
    assert_upright(tmp_path / "x.png", orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_every_orientation_of_a_tiff_is_turned_upright_once(orientation: int, compression: str | None, tmp_path: Path) -> None:
    """Pillow turns a TIFF itself."""
    exif = Image.Exif()
    exif[0x112] = orientation
    (tmp_path / "x.tif").write_bytes(encoded("TIFF", exif=exif, compression=compression))
    assert_upright(tmp_path / "x.tif", orientation)


def assert_upright(path: Path, orientation: int) -> None:
    """The file has PIXELS with an orientation; by the EXIF standard's table, it is read as they are to be seen."""
    upright = {
        1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1], 5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1), 7: PIXELS[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(PIXELS),
    }[orientation]  # fmt: skip
    height, width = upright.shape[:2]
    loaded = read_image(path, (3, height, width))
    assert loaded.note == ""
    assert np.array_equal(loaded.pixels.mul(255).round().numpy(), upright.transpose(2, 0, 1))
    fitted = ImageOps.fit(Image.fromarray(np.ascontiguousarray(upright)), (6, 6), Image.Resampling.LANCZOS)
    assert np.array_equal(decode_fitted(path.read_bytes(), 6, "here"), np.asarray(fitted).transpose(2, 0, 1))


@pytest.mark.parametrize(
    "data", [png(b"zTXt", LONG_TEXT)[:-60], jpeg(EXIF + b"garbage!")[:-40], b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]
)
def test_damaged_pixels_are_refused_nevertheless(data: bytes) -> None:
    for read in (EVERYWHERE["folder"], EVERYWHERE["stream"]):
        with pytest.raises(UserError, match=r"^here: not an image that can be decoded \("):
            read(data, Path())

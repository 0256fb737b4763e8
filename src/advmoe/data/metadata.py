"""The metadata of an image file: the orientation, which is used, and the rest, without which an image can be decoded."""

from collections.abc import Iterator

from PIL import Image

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"eXIf")  # the pixels, and the orientation
ORIENTATION = 0x0112  # EXIF's tag
UPRIGHT = {  # EXIF orientation -> what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations in which width and height are exchanged


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, from 1 (upright) to 8; 1 if there is none or the metadata cannot be read.

    Some formats have their metadata at the end, so that Pillow may decode the image to find it.
    """
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata can raise nearly any exception; damaged pixels do so again when they are decoded
        return 1
    return value if isinstance(value, int) and value in UPRIGHT else 1


def without_metadata(data: bytes) -> bytes:
    """An encoded PNG or JPEG without texts, colour profiles, previews and the like; other data unchanged."""
    if data.startswith(PNG_MAGIC):
        return PNG_MAGIC + b"".join(chunk for chunk in _png_chunks(data) if chunk[4:8] in PNG_CHUNKS)
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd8" + b"".join(_jpeg_segments(data))
    return data


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """Length, type, content and checksum of each chunk."""
    start = len(PNG_MAGIC)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        yield data[start:end]
        start = end


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    """The segments before the pixels that are needed (EXIF among them, and Adobe's, which says how colours are stored), and
    the rest of the file as it is."""
    start = 2
    while data[start : start + 1] == b"\xff" and start + 4 <= len(data) and data[start + 1] != 0xDA:
        marker, end = data[start + 1], start + 2 + int.from_bytes(data[start + 2 : start + 4])
        segment = data[start:end]
        needed = segment[4:10] == b"Exif\0\0" or (marker == 0xEE and segment[4:9] == b"Adobe" and len(segment) >= 16)
        if needed or not (0xE0 <= marker <= 0xEF or marker == 0xFE):  # application data and comments
            yield segment
        start = end
    yield data[start:]

"""Encoded images to arrays."""

import io
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from advmoe.errors import UserError

JPEG_MAGIC = b"\xff\xd8\xff"
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # not EPS, which Pillow hands to another program
MAX_PIXELS = 64_000_000  # of one image: a small file can claim to hold any number
DEEP_MODES = ("I", "F")  # and I;16: more than 8 bits a channel, which Pillow would cut off at 255


def decode(data: bytes, size: int, where: str) -> np.ndarray:
    """An encoded image of exactly size x size as [3, size, size] uint8. Raises UserError, led by `where`."""
    with opened(data, where) as image:
        if image.size != (size, size):
            raise UserError(f"{where}: the image is {image.width} x {image.height}, not {size} x {size}")
        return _array(rgb(image, where))


def decode_fitted(data: bytes, size: int, where: str) -> np.ndarray:
    """An encoded image of any size as [3, size, size] uint8: upright, its shorter side resized to `size`, the middle of it.

    Upright is as its EXIF orientation says; the resampling is Lanczos' with antialiasing, and none at all where the size
    is right. Raises UserError, led by `where`.
    """
    with opened(data, where) as image:
        return _array(ImageOps.fit(rgb(image, where, upright=True), (size, size), Image.Resampling.LANCZOS))


def size_of(data: bytes, where: str) -> tuple[int, int]:
    """(width, height) of an encoded image as it is stored; its pixels are not decoded. Raises UserError, led by `where`."""
    with opened(data, where) as image:
        return image.size


@contextmanager
def opened(data: bytes, where: str) -> Iterator[Image.Image]:
    """An encoded image, to be decoded. Raises UserError, led by `where`, for whatever fails within."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{where}: not an image that can be decoded (none of {', '.join(FORMATS)})") from None
    except Exception as error:  # a damaged image raises nearly anything
        raise UserError(f"{where}: not an image that can be decoded ({' '.join(str(error).split())[:120]})") from None


def rgb(image: Image.Image, where: str, upright: bool = False) -> Image.Image:
    """An opened image decoded, in RGB whatever its colours (transparency is dropped, of several frames the first is taken).

    Raises UserError, led by `where`, for one of more than MAX_PIXELS (before it is decoded) or more than 8 bits a channel.
    """
    check_size(image, where)
    if image.mode.partition(";")[0] in DEEP_MODES:
        raise UserError(f"{where}: the image has pixels of kind {image.mode}, not 8 bits a channel")
    return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")


def check_size(image: Image.Image, where: str) -> None:
    """Raises UserError, led by `where`, for an opened image of more than MAX_PIXELS, before it is decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{where}: the image is {image.width} x {image.height}: more than {MAX_PIXELS:,} pixels")


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def decode_all(count: int, size: int, image: Callable[[int], np.ndarray]) -> np.ndarray:
    """[count, 3, size, size] uint8 of what `image` gives for each row, on all cores; holds no image twice.

    Raises the error of the first row that has one, and UserError where the images exceed the memory.
    """
    try:
        images = np.empty((count, 3, size, size), dtype=np.uint8)
    except (MemoryError, ValueError):
        raise UserError(f"{count} images of {size} x {size} need {count * 3 * size**2 / 2**30:.0f} GiB of memory") from None

    def fill(row: int) -> None:
        images[row] = image(row)

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's, on sizes that are refused here and on odd metadata
        for _ in pool.map(fill, range(count)):
            pass
    return images

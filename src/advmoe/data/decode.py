"""Encoded images to arrays."""

import io
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from advmoe.data.metadata import UPRIGHT, orientation, without_metadata
from advmoe.errors import UserError, reason_of

Result = TypeVar("Result")

JPEG_MAGIC = b"\xff\xd8\xff"
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # not EPS, for which Pillow starts another program
CHUNK = 16  # images that a thread decodes at a time; starting a task for each small image would cost as much as the image
MAX_PIXELS = 64_000_000  # of one image: a small file can claim any number
SIXTEEN_BIT = "I;16"  # grey; of colours with 16 bits a channel Pillow returns the upper 8 bits only
OTHER_DEPTHS = ("I", "F")  # of pixels whose range is not known, which Pillow would cut off at 255


def decode(data: bytes, size: int, where: str) -> np.ndarray:
    """An encoded image of exactly size x size as [3, size, size] uint8. Raises UserError, which starts with `where`."""

    def pixels(image: Image.Image) -> np.ndarray:
        if image.size != (size, size):
            raise UserError(f"{where}: the image is {image.width} x {image.height}, not {size} x {size}")
        return _array(to_rgb(image, where))

    return with_image(data, where, pixels)


def decode_fitted(data: bytes, size: int, where: str) -> np.ndarray:
    """An encoded image of any size as [3, size, size] uint8: upright, its shorter side resized to `size`, cropped to the middle.

    The EXIF orientation is applied first. Resampling is Lanczos with antialiasing; an image of the right size is not
    resampled. Raises UserError, which starts with `where`.
    """

    def pixels(image: Image.Image) -> np.ndarray:
        return _array(ImageOps.fit(to_rgb(image, where, upright=True), (size, size), Image.Resampling.LANCZOS))

    return with_image(data, where, pixels)


def stored_size(data: bytes, where: str) -> tuple[int, int]:
    """(width, height) of an encoded image as stored, without decoding its pixels. Raises UserError, which starts with `where`."""
    return with_image(data, where, lambda image: image.size)


def with_image(data: bytes, where: str, function: Callable[[Image.Image], Result]) -> Result:
    """The result of `function` for the opened image, whose pixels are not decoded yet.

    Metadata that Pillow cannot read do not matter: if anything fails, the image is opened again without them. Raises
    UserError, which starts with `where`, for whatever fails then.
    """
    try:
        return _apply(data, function)
    except UserError:
        raise
    except Exception:  # a damaged image can raise nearly any exception, and so can damaged metadata
        data = without_metadata(data)
    try:
        return _apply(data, function)
    except UserError:
        raise
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"none of {', '.join(FORMATS)}" if unknown else reason_of(error)
        raise UserError(f"{where}: not an image that can be decoded ({reason})") from None


def _apply(data: bytes, function: Callable[[Image.Image], Result]) -> Result:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return function(image)


def to_rgb(image: Image.Image, where: str, upright: bool = False) -> Image.Image:
    """An opened image decoded to RGB, whatever its colours. Transparency is dropped; of several frames the first is taken; grey
    of 16 bits is rounded to 8.

    Raises UserError, which starts with `where`, if it has more than MAX_PIXELS (before it is decoded), or pixels of 32 bits.
    """
    check_size(image, where)
    if image.mode in OTHER_DEPTHS:
        raise UserError(f"{where}: the image has pixels of kind {image.mode}, not of 8 or 16 bits: convert it first")
    image = turn_upright(image) if upright else image
    if image.mode.startswith(SIXTEEN_BIT):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def turn_upright(image: Image.Image) -> Image.Image:
    """The image, decoded and turned as its metadata say."""
    image.load()  # Pillow turns a TIFF when it decodes it, and then its orientation is 1
    method = UPRIGHT.get(orientation(image))
    return image if method is None else image.transpose(method)


def check_size(image: Image.Image, where: str) -> None:
    """Raises UserError, which starts with `where`, if an opened image has no pixels or more than MAX_PIXELS, before it is
    decoded."""
    if not image.width * image.height:
        raise UserError(f"{where}: the image has no pixels")
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{where}: the image is {image.width} x {image.height}: more than {MAX_PIXELS:,} pixels")


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def decode_all(count: int, size: int, image: Callable[[int], np.ndarray]) -> np.ndarray:
    """[count, 3, size, size] uint8 of the images that `image` returns for each row, decoded on all cores.

    Raises the error of the first row that has one, and UserError if the images do not fit in memory.
    """
    try:
        images = np.empty((count, 3, size, size), dtype=np.uint8)
    except (MemoryError, ValueError):
        raise UserError(f"{count} images of {size} x {size} need {count * 3 * size**2 / 2**30:.0f} GiB of memory") from None

    def fill(start: int) -> None:
        for row in range(start, min(start + CHUNK, count)):
            images[row] = image(row)

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's, on sizes that are refused here and on odd metadata
        for _ in pool.map(fill, range(0, count, CHUNK)):
            pass
    return images

"""Encoded pictures to arrays."""

import io
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, UnidentifiedImageError

from advmoe.errors import UserError

JPEG_MAGIC = b"\xff\xd8\xff"
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF")  # not EPS, which Pillow hands to another program


def decode(data: bytes, size: int, where: str) -> np.ndarray:
    """An encoded picture as [3, size, size] uint8. Raises UserError, led by `where`."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            found = picture.size
            pixels = np.asarray(picture.convert("RGB")) if found == (size, size) else None
    except UnidentifiedImageError:
        raise UserError(f"{where}: not a picture that can be decoded (none of {', '.join(FORMATS)})") from None
    except Exception as error:  # a damaged picture raises nearly anything
        raise UserError(f"{where}: not a picture that can be decoded ({' '.join(str(error).split())[:120]})") from None
    if pixels is None:
        raise UserError(f"{where}: the picture is {found[0]} x {found[1]}, not {size} x {size}")
    return pixels.transpose(2, 0, 1)


def decode_all(items: Sequence[bytes], size: int, where: Callable[[int], str]) -> np.ndarray:
    """[n, 3, size, size] uint8 of encoded pictures; `where(row)` names one in an error."""
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused by its size, before it is decoded
        return np.stack(list(pool.map(lambda row: decode(items[row], size, where(row)), range(len(items)))))

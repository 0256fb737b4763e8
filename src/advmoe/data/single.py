"""One image from a file of any supported format, in the form that a network takes."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from advmoe.data import arrays
from advmoe.data.decode import SIXTEEN_BIT, check_size, to_rgb, with_image
from advmoe.data.metadata import SIDEWAYS, orientation
from advmoe.data.stream import centre_crop
from advmoe.errors import UserError
from advmoe.files import check_plain

MAX_BYTES = 2**29  # of one file: more than MAX_PIXELS take at two bytes a channel
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis")

Shape = tuple[int, int, int]


class LoadedImage(NamedTuple):
    """`pixels` [C, H, W] float32 in [0, 1]; `note` says how the image in the file was changed, "" if it was not."""

    pixels: Tensor
    note: str


def is_central(dataset: str) -> bool:
    """Whether images are resized and cropped as in the evaluation on the data set `dataset`, ImageNet: see `centre_crop`."""
    return dataset == "imagenet"


def read_image(path: Path, shape: Shape, *, central: bool = False) -> LoadedImage:
    """The image in a file, as `shape` (C, H, W): turned upright, its shorter side resized, cropped to the middle.

    An image of the right size is not resampled; of several frames the first is taken. `central` resizes as the evaluation on
    ImageNet does. An .npy file contains the pixels themselves: floats in [0, 1] of that shape. Raises UserError, which
    starts with the path, if the file cannot be read.
    """
    data = _bytes(path)
    if data.startswith(arrays.MAGIC):
        return LoadedImage(_array(data, shape, str(path)), "")
    return with_image(data, str(path), lambda image: fit_image(image, shape, str(path), central=central))


def fit_image(image: Image.Image, shape: Shape, where: str, *, central: bool = False) -> LoadedImage:
    """An opened PIL image in the form that `read_image` gives. Raises UserError, which starts with `where`, if it is too large."""
    channels, height, width = shape
    check_size(image, where)  # first, because `_notes` reads the orientation, for which Pillow may decode the image
    notes = list(_notes(image, channels, (width, height)))
    converted = to_rgb(image, where, upright=True).convert("L" if channels == 1 else "RGB")
    pixels = np.array(_fitted(converted, (width, height), central))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return LoadedImage(torch.from_numpy(np.ascontiguousarray(pixels)).float().div_(255), "; ".join(notes))


def _bytes(path: Path) -> bytes:
    try:
        check_plain(path, MAX_BYTES)
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not data:
        raise UserError(f"{path}: is empty")
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
        raise UserError(f"{path}: HEIC and AVIF images are not supported; convert it to PNG or JPEG")
    return data


def _array(data: bytes, shape: Shape, where: str) -> Tensor:
    array = arrays.parse_npy(data, where)
    if array.dtype.kind != "f" or array.shape != shape or not ((array >= 0) & (array <= 1)).all():
        values = f", values from {array.min():g} to {array.max():g}" if array.dtype.kind == "f" and array.size else ""
        raise UserError(f"{where}: {array.dtype} of shape {array.shape}{values}; needed are floats in [0, 1] of shape {shape}")
    return torch.from_numpy(array.astype(np.float32))


def _notes(file: Image.Image, channels: int, size: tuple[int, int]) -> Iterator[str]:
    """What `read_image` changes in an opened image, for the user."""
    stored = str(getattr(file, "tile", ""))  # how pixels are stored; decoding clears it
    file.load()  # a TIFF may be turned and have another size then
    upright = file.size[::-1] if orientation(file) in SIDEWAYS else file.size
    if upright != size:
        yield f"resized from {upright[0]} x {upright[1]}"
    if getattr(file, "is_animated", False):
        yield "first of its frames"
    if file.mode.startswith(SIXTEEN_BIT):
        yield "16 bits a channel rounded to 8"
    elif ";16" in stored:  # colours, of which Pillow returns the upper 8 bits only
        yield "16 bits a channel cut to 8"
    if file.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in file.info:
        yield "transparency dropped"
    grey = file.mode in ("1", "L", "LA", "La") or file.mode.startswith(SIXTEEN_BIT) or "LA;16" in stored
    if grey != (channels == 1):
        yield "grey" if grey else "colours dropped"
    if file.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        yield f"converted from {file.mode}"


def _fitted(image: Image.Image, size: tuple[int, int], central: bool) -> Image.Image:
    if image.size == size:
        return image
    if central:
        return image.resize(size, Image.Resampling.BILINEAR, centre_crop(*image.size))
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)

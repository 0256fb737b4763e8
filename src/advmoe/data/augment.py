"""Random changes of a batch of training images, computed on the device of the batch.

Shapes: B images, C channels, H x W pixels. Every augmentation maps [B, C, H, W] uint8 to the same shape and takes its random
numbers, in [0, 1), as draws [n, B, 1]: what happens to an image depends on its draws alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from advmoe.config import DataConfig
from advmoe.data import idbh

MAX_SHIFT = 10  # pixels that CropShift removes, over rows and columns together


@dataclass(frozen=True)
class Augmentation:
    """`apply(images, data, draws)` returns the changed images; `draws` are `count` random numbers for each image."""

    count: int
    apply: Callable[[Tensor, DataConfig, Tensor], Tensor]


def augmentation_draws(batch_size: int, generator: torch.Generator, count: int = 3) -> Tensor:
    """Random numbers in [0, 1), [`count`, B, 1]. The three of `augment` are the row offset, the column offset, and the flip."""
    return torch.rand(count, batch_size, 1, generator=generator, device=generator.device)


def augment(images: Tensor, padding: int, flip: bool, draws: Tensor) -> Tensor:
    """Random crops after zero padding, and random horizontal flips: [B, C, H, W] uint8 -> the same shape.

    `draws` come from `augmentation_draws`. This is the usual CIFAR augmentation (appendix B uses the standard pipeline).
    """
    batch, _, height, width = images.shape
    device = images.device
    rows = (draws[0] * (2 * padding + 1)).long() + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(batch, width)
    if flip:
        columns = torch.where(draws[2] < 0.5, width - 1 - columns, columns)
    columns = columns + (draws[1] * (2 * padding + 1)).long()
    return _pixels(pad(images, (padding,) * 4), rows, columns)


def crop_shift(images: Tensor, flip: bool, draws: Tensor) -> Tensor:
    """CropShift(0, 10) and random horizontal flips: an image loses s pixels in height and width together, and what remains is put
    at a random position on black.

    s is uniform on 0 to 10 (less for smaller images), its part in the width uniform on 0 to s. So an image loses fewer pixels
    than by a crop after padding, in more different ways. `draws` [7, B, 1]: s, its split, the row and column that the crop starts
    at, the row and column that it is put at, the flip. Source: Li and Spratling, "Data augmentation alone can improve adversarial
    training", ICLR 2023, section 3.
    """
    height, width = images.shape[2:]
    removed = _integers(draws[0], min(MAX_SHIFT, height - 1, width - 1))
    across = _integers(draws[1], removed)
    down = removed - across
    rows, in_rows = _shifted(height, down, _integers(draws[2], down), _integers(draws[4], down))
    columns, in_columns = _shifted(width, across, _integers(draws[3], across), _integers(draws[5], across))
    if flip:
        columns = torch.where(draws[6] < 0.5, width - 1 - columns, columns)
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return _pixels(images, rows, columns) * inside


def _pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels of each image at its `rows` [B, height] and `columns` [B, width]: [B, C, height, width]."""
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _integers(draws: Tensor, largest: Tensor | int) -> Tensor:
    """Draws in [0, 1) as whole numbers from 0 to `largest`, each equally likely."""
    return (draws * (largest + 1)).long()


def _shifted(side: int, removed: Tensor, start: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """For each pixel of a side, where it comes from, and whether it comes from the crop: [B, side] int64 and bool.

    The crop has `side` - `removed` pixels from `start` on and is put at `target` (all [B, 1]).
    """
    positions = torch.arange(side, device=removed.device) - target
    inside = (positions >= 0) & (positions < side - removed)
    return (positions + start).clamp(0, side - 1), inside


def _idbh_weak(images: Tensor, data: DataConfig, draws: Tensor) -> Tensor:
    shifted, changed, erased = draws.split((7, idbh.OPERATION_DRAWS, idbh.ERASE_DRAWS))
    return idbh.erase(idbh.one_operation(crop_shift(images, data.flip, shifted), changed), erased)


AUGMENTATIONS = {
    "crop_flip": Augmentation(3, lambda images, data, draws: augment(images, data.crop_padding, data.flip, draws)),
    "crop_shift": Augmentation(7, lambda images, data, draws: crop_shift(images, data.flip, draws)),
    "idbh_weak": Augmentation(7 + idbh.OPERATION_DRAWS + idbh.ERASE_DRAWS, _idbh_weak),
}

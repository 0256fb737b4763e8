"""The parts of IDBH-weak that follow CropShift: one operation on the colours or the shape of an image, and random erasing.

Source: Li and Spratling, "Data augmentation alone can improve adversarial training", ICLR 2023 (CIFAR-10, weak). The operations
are those of AutoAugment (Cubuk et al. 2019), as Pillow defines them. All are computed for all images of a batch, and one is
chosen for each image, so that nothing waits for the device. Shapes: B images [B, C, H, W] uint8; draws [n, B, 1] in [0, 1).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

OPERATION_DRAWS = 4  # which operation, its strength, its sign, and the axis of a shear
GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luma, of red, green and blue
SATURATION, LIGHT = (0.1, 1.9), (0.5, 1.9)  # ranges of the factors: 1 leaves an image as it is
SHEAR, DEGREES = (0.05, 0.15), 10  # radians; whole degrees from 1
ERASE_SHARE, ERASE_AREA, ERASE_RATIO, ERASE_TRIES = 0.5, (0.02, 0.33), (0.3, 3.3), 10
ERASE_DRAWS = 3 + 2 * ERASE_TRIES  # whether, row, column; and each try's area and shape


# One operation


def one_operation(images: Tensor, draws: Tensor) -> Tensor:
    """Each image after one of eight operations, all equally likely: colour, brightness, contrast, sharpness, autocontrast,
    equalize, shear, rotate."""
    number = (draws[0] * (len(COLOURS) + 2)).long()[..., None, None]
    pixels = images.float()
    out = pixels
    for index, operation in enumerate(COLOURS):
        out = torch.where(number == index, operation(pixels, draws[1][..., None, None]), out)
    return warp(out.round().clamp(0, 255).to(torch.uint8), _matrices(number[..., 0, 0] - len(COLOURS), draws))


def colour(x: Tensor, strength: Tensor) -> Tensor:
    """The image blended with its grey version, by a factor of 0.1 to 1.9."""
    return _blend(x, _grey(x), _between(strength, SATURATION))


def brightness(x: Tensor, strength: Tensor) -> Tensor:
    """The image blended with black, by a factor of 0.5 to 1.9."""
    return _blend(x, torch.zeros_like(x), _between(strength, LIGHT))


def contrast(x: Tensor, strength: Tensor) -> Tensor:
    """The image blended with its mean grey, by a factor of 0.5 to 1.9."""
    return _blend(x, _grey(x).mean(dim=(1, 2, 3), keepdim=True), _between(strength, LIGHT))


def sharpness(x: Tensor, strength: Tensor) -> Tensor:
    """The image blended with a smoothed version, by a factor of 0.1 to 1.9. Pixels at the border stay."""
    height, width = x.shape[2:]
    if min(height, width) < 3:
        return x
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = (9 * F.avg_pool2d(x, 3, stride=1) + 4 * x[:, :, 1:-1, 1:-1]) / 13  # the centre counts 5 times
    return _blend(x, smooth, _between(strength, SATURATION))


def autocontrast(x: Tensor, strength: Tensor) -> Tensor:
    """Each channel stretched to 0 to 255; a channel of one value stays."""
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (x - low) * 255 / (high - low).clamp(min=1), x)


def equalize(x: Tensor, strength: Tensor) -> Tensor:
    """Each channel with its histogram evened out; a channel of one value stays."""
    values = x.long().flatten(2)
    counts = values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(dim=2, keepdim=True))
    step = (values.shape[2] - last) // 255
    below = counts.cumsum(dim=2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(2, values), values).view_as(x).float()


COLOURS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (colour, brightness, contrast, sharpness, autocontrast, equalize)


def _between(draws: Tensor, ends: tuple[float, float]) -> Tensor:
    return ends[0] + draws * (ends[1] - ends[0])


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return factor * x + (1 - factor) * other


def _grey(x: Tensor) -> Tensor:
    """The image without colours, [B, 1, H, W]; images that are not RGB have none."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    return (x * x.new_tensor(GREY)[:, None, None]).sum(dim=1, keepdim=True)


# Shear and rotation


def _matrices(number: Tensor, draws: Tensor) -> Tensor:
    """[B, 2, 2]: from a pixel of the result to the pixel it comes from, both from the centre as (row, column).

    `number` [B, 1] is 0 for a shear along the rows or columns, 1 for a rotation; images of other numbers stay as they are.
    """
    sign = torch.where(draws[2] < 0.5, -1.0, 1.0)
    slope = sign * _between(draws[1], SHEAR).tan()
    angle = sign * (1 + (draws[1] * DEGREES).floor()) * (math.pi / 180)
    one, zero, along_rows = torch.ones_like(slope), torch.zeros_like(slope), draws[3] < 0.5
    shear = torch.stack([one, torch.where(along_rows, zero, slope), torch.where(along_rows, slope, zero), one])
    rotation = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()])
    same = torch.stack([one, zero, zero, one])
    entries = torch.where(number == 0, shear, torch.where(number == 1, rotation, same))
    return entries[..., 0].T.view(-1, 2, 2)


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Each pixel is the one nearest to its position times the image's matrix [B, 2, 2], from the centre; outside is black."""
    batch, channels, height, width = images.shape
    device = images.device
    centre = torch.tensor([(height - 1) / 2, (width - 1) / 2], device=device)
    row, column = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    positions = torch.stack([row.flatten(), column.flatten()]) - centre[:, None]
    sources = (matrices @ positions + centre[:, None]).round().long()
    rows, columns = sources[:, 0], sources[:, 1]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    index = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    pixels = images.flatten(2).gather(2, index[:, None].expand(-1, channels, -1))
    return (pixels * inside[:, None]).view(batch, channels, height, width)


# Random erasing


def erase(images: Tensor, draws: Tensor) -> Tensor:
    """Half of the images with one black rectangle of 2 to 33 % of the area and a shape of 0.3 to 3.3 (Zhong et al. 2020).

    The first of 10 random sizes that fits is used; if none does, the image stays.
    """
    height, width = images.shape[2:]
    apply, row, column = draws[:3]
    areas, shapes = draws[3:].chunk(2)
    area = _between(areas, ERASE_AREA) * height * width
    ratio = _between(shapes, (math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1]))).exp()
    tall, wide = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (tall < height) & (wide < width)
    tries = torch.arange(ERASE_TRIES, device=images.device)[:, None, None]
    first = torch.where(fits, tries, ERASE_TRIES).amin(dim=0, keepdim=True)
    chosen = first.clamp(max=ERASE_TRIES - 1)
    tall, wide = tall.gather(0, chosen)[0], wide.gather(0, chosen)[0]
    erased = (apply < ERASE_SHARE) & (first[0] < ERASE_TRIES)
    in_rows, in_columns = _inside(height, row, tall), _inside(width, column, wide)
    rectangle = erased[..., None] & in_rows[:, :, None] & in_columns[:, None, :]
    return images.masked_fill(rectangle[:, None], 0)


def _inside(side: int, draws: Tensor, length: Tensor) -> Tensor:
    """Which pixels of a side lie in a stretch of `length` pixels [B, 1] at a random start: [B, side] bool."""
    start = (draws * (side - length + 1)).floor()
    pixels = torch.arange(side, device=draws.device)
    return (pixels >= start) & (pixels < start + length)

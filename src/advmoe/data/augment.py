"""Augmentation of a whole batch at once, on the device that holds it."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def drawn(batch: int, generator: torch.Generator) -> Tensor:
    """What decides the crops and mirrorings of so many images: [3, B, 1] in [0, 1)."""
    return torch.rand(3, batch, 1, generator=generator, device=generator.device)


def augment(images: Tensor, padding: int, flip: bool, draws: Tensor) -> Tensor:
    """Random crops after zero padding, random mirroring: [B, C, H, W] uint8 -> the same shape; `draws` are of `drawn`.

    A convolutional network's usual CIFAR augmentation (appendix B follows the standard pipeline).
    """
    batch, channels, height, width = images.shape
    device = images.device
    rows = (draws[0] * (2 * padding + 1)).long() + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(batch, width)
    if flip:
        columns = torch.where(draws[2] < 0.5, width - 1 - columns, columns)
    columns = columns + (draws[1] * (2 * padding + 1)).long()
    image = torch.arange(batch, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return pad(images, (padding,) * 4)[image, channel, rows[:, None, :, None], columns[:, None, None, :]]

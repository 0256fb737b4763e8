"""Random crops and flips of a batch of images, computed on the device of the batch."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def augmentation_draws(batch_size: int, generator: torch.Generator) -> Tensor:
    """Random numbers in [0, 1), [3, B, 1]: for each image its row offset, its column offset, and whether it is flipped."""
    return torch.rand(3, batch_size, 1, generator=generator, device=generator.device)


def augment(images: Tensor, padding: int, flip: bool, draws: Tensor) -> Tensor:
    """Random crops after zero padding, and random horizontal flips: [B, C, H, W] uint8 -> the same shape.

    `draws` come from `augmentation_draws`. This is the usual CIFAR augmentation (appendix B uses the standard pipeline).
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

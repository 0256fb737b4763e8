"""The memory format of batches of images: contiguous [B, C, H, W], or channels last."""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x [B, C, H, W] is stored with its channels last, and not in both formats at once (as with one channel)."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def empty_like(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of another shape and dtype, on the device of x and in its memory format."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)

"""Dispatches of static shapes, which need no word of the route on the host: a wide convolution, and one grouped by image."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from advmoe.moe.experts import Experts, every, mixture


def wide(x: Tensor, own: Experts, experts: Tensor, one_hot: Tensor | None) -> Tensor:
    """As `dispatch.chosen`, by all experts on all images in one convolution: N times the arithmetic, the fewest calls."""
    if one_hot is not None:
        return mixture(x, own, one_hot)
    parts = every(x, own).permute(0, 1, 3, 4, 2)  # channels last, which the convolution may have written
    return parts[torch.arange(len(x), device=x.device), experts].permute(0, 3, 1, 2)


def grouped(x: Tensor, own: Experts, experts: Tensor, one_hot: Tensor | None) -> Tensor:
    """As `dispatch.chosen`, by a grouped convolution over each image's filters, which are copied out of the bank.

    Under the straight-through gate they are the one-hot's mixture of all filters: convolution is linear in them.
    """
    if len(x) == 0:
        return wide(x, own, experts, one_hot)
    filters = torch.stack([own.filters(e) for e in range(len(own.starts))])  # [N, K, C, k, k]
    bias = None if own.bias is None else _picked(own.bias, experts, one_hot).flatten().to(x.dtype)
    rows = _picked(filters, experts, one_hot).flatten(0, 1)
    y: Tensor = conv2d(x.flatten(0, 1)[None], rows, bias, own.stride, own.padding, groups=len(x))
    images: Tensor = y[0].unflatten(0, (len(x), -1))
    return images


def _picked(of_experts: Tensor, experts: Tensor, one_hot: Tensor | None) -> Tensor:
    """Each image's entry [B, ...] of what the experts have [N, ...]."""
    picked: Tensor = of_experts[experts] if one_hot is None else torch.tensordot(one_hot.to(of_experts.dtype), of_experts, dims=1)
    return picked

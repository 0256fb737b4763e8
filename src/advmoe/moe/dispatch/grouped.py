"""Dispatch by a grouped convolution with one group per image. Its shapes are static: the host never waits for the route."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from advmoe.moe.dispatch.wide import wide
from advmoe.moe.experts import FilterBank


def grouped(x: Tensor, bank: FilterBank, experts: Tensor, one_hot: Tensor | None) -> Tensor:
    """As `run_chosen`, by a grouped convolution. The filters of each image are copied from the bank.

    Under the straight-through gate the filters are mixed with `one_hot`: convolution is linear in its filters.
    """
    if len(x) == 0:
        return wide(x, bank, experts, one_hot)
    filters = torch.stack([bank.of_expert(e) for e in range(len(bank.starts))])  # [N, K, C, k, k]
    bias = None if bank.bias is None else _picked(bank.bias, experts, one_hot).flatten().to(x.dtype)
    rows = _picked(filters, experts, one_hot).flatten(0, 1)
    y: Tensor = conv2d(x.flatten(0, 1)[None], rows, bias, bank.stride, bank.padding, groups=len(x))
    images: Tensor = y[0].unflatten(0, (len(x), -1))
    return images


def _picked(of_experts: Tensor, experts: Tensor, one_hot: Tensor | None) -> Tensor:
    """For each image the entry of its expert: [N, ...] -> [B, ...]."""
    picked: Tensor = of_experts[experts] if one_hot is None else torch.tensordot(one_hot.to(of_experts.dtype), of_experts, dims=1)
    return picked

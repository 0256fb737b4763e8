"""The filters of a layer's experts, stored as windows of one bank; and a convolution that runs all experts on all images.

Shapes: B images, N experts, K filters per expert, M filters in the bank. Expert e uses the filters
bank[starts[e] : starts[e] + K]. Filter m writes output channel m mod K, so a filter that two experts share writes the same
channel in both.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d


class Windows(NamedTuple):
    """The experts' windows in a bank: `starts` are their N first filters, `width` is K, and `size` is M."""

    starts: tuple[int, ...]
    width: int
    size: int


def windows(bank: str, num_experts: int, out_channels: int, width: int) -> Windows:
    """The windows of `num_experts` experts of `width` filters, K, in a new bank.

    `disjoint`: N windows that do not overlap, M = N * K. `backbone`: expert e takes K of the dense layer's `out_channels` filters,
    C_out, starting at round(e * (C_out - K) / (N - 1)). Filters that no expert uses are not in the bank.
    """
    if bank == "disjoint":
        return Windows(tuple(e * width for e in range(num_experts)), width, num_experts * width)
    gaps = max(num_experts - 1, 1)
    firsts = [(2 * e * (out_channels - width) + gaps) // (2 * gaps) for e in range(num_experts)]
    starts, used = [0], width
    for previous, first in pairwise(firsts):
        step = min(first - previous, width)  # no expert uses the filters in a gap between two windows
        starts.append(starts[-1] + step)
        used += step
    return Windows(tuple(starts), width, used)


@dataclass(frozen=True, eq=False)
class FilterBank:
    """The filters of one layer's experts: `filters` [M, C, k, k] and `bias` [N, K] or None.

    Expert e uses the `width` filters that start at `starts[e]`. `dispatch` is the name of the method that runs them.
    """

    filters: Tensor
    starts: tuple[int, ...]
    width: int
    stride: int
    bias: Tensor | None = None
    dispatch: str = "auto"

    def convolve(self, x: Tensor, expert: int) -> Tensor:
        """Run one expert on all images: [B, C, H, W] -> [B, K, H', W']."""
        bias = None if self.bias is None else self.bias[expert].to(x.dtype)
        return conv2d(x, self.of_expert(expert), bias, self.stride, self.padding)

    def of_expert(self, expert: int) -> Tensor:
        """The filters [K, C, k, k] of one expert, in the order of its output channels."""
        return aligned(self.filters, self.starts[expert], self.width)

    @property
    def padding(self) -> int:
        """The zero padding on each side; with stride 1 it keeps height and width."""
        return self.filters.shape[-1] // 2


def mixture(x: Tensor, bank: FilterBank, weights: Tensor) -> Tensor:
    """The sum of all experts' outputs, weighted by `weights` [B, N]: [B, C, H, W] -> [B, K, H', W']."""
    parts = every_expert(x, bank)
    return torch.bmm(weights.to(parts.dtype)[:, None], parts.flatten(2)).view(len(x), *parts.shape[2:])


def every_expert(x: Tensor, bank: FilterBank) -> Tensor:
    """The outputs of all experts for all images, by one wide convolution: [B, C, H, W] -> [B, N, K, H', W']."""
    wide = conv2d(x, bank.filters, stride=bank.stride, padding=bank.padding)
    parts: Tensor
    if bank.starts == tuple(range(0, wide.shape[1], bank.width)):
        parts = wide.unflatten(1, (len(bank.starts), bank.width))
    else:
        parts = torch.stack([aligned(wide, start, bank.width, dim=1) for start in bank.starts], dim=1)
    if bank.bias is not None:
        parts = parts + bank.bias.to(parts.dtype)[:, :, None, None]
    return parts


def aligned(stack: Tensor, start: int, width: int, dim: int = 0) -> Tensor:
    """The entries `start` to `start + width` of `stack` along `dim`, rotated so that entry m is at index m mod `width`."""
    offset = start % width
    if offset == 0:
        return stack.narrow(dim, start, width)
    return torch.cat([stack.narrow(dim, start + width - offset, offset), stack.narrow(dim, start, width - offset)], dim=dim)

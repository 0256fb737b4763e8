"""The filters of a layer's experts, as windows of one bank; and all experts at once on all images.

Shapes: B images, N experts, K filters an expert, M filters in the bank. Expert e owns the window
bank[starts[e] : starts[e] + K]; filter m writes output channel m mod K, so a filter that two experts share stands in
the same channel of both.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import conv2d

Windows = tuple[int, ...]


def windows(bank: str, num_experts: int, out_channels: int, width: int) -> tuple[Windows, int]:
    """Where each expert's `width` filters start in the bank, and the bank's size M.

    `disjoint`: N * K filters side by side. `backbone`: expert e takes K of the dense layer's `out_channels` filters
    from round(e * (C_out - K) / (N - 1)) on; filters in no window are left out.
    """
    if bank == "disjoint":
        return tuple(e * width for e in range(num_experts)), num_experts * width
    gaps = max(num_experts - 1, 1)
    firsts = [(2 * e * (out_channels - width) + gaps) // (2 * gaps) for e in range(num_experts)]
    starts, used = [0], width
    for previous, first in pairwise(firsts):
        step = min(first - previous, width)  # a gap between two windows holds filters of no expert
        starts.append(starts[-1] + step)
        used += step
    return tuple(starts), used


@dataclass(frozen=True, eq=False)
class Experts:
    """The filters of one layer's experts: `bank` [M, C, k, k], `bias` [N, K] or none; `dispatch` says how they are run."""

    bank: Tensor
    starts: Windows
    width: int
    stride: int
    bias: Tensor | None = None
    dispatch: str = "auto"

    def convolve(self, x: Tensor, expert: int) -> Tensor:
        """One expert on all images: [B, C, H, W] -> [B, K, H', W']."""
        bias = None if self.bias is None else self.bias[expert].to(x.dtype)
        return conv2d(x, self.filters(expert), bias, self.stride, self.padding)

    def filters(self, expert: int) -> Tensor:
        """[K, C, k, k], each at its output channel's place."""
        return aligned(self.bank, self.starts[expert], self.width)

    @property
    def padding(self) -> int:
        return self.bank.shape[-1] // 2


def mixture(x: Tensor, own: Experts, weights: Tensor) -> Tensor:
    """Every expert on every image, summed with `weights` [B, N]: [B, C, H, W] -> [B, K, H', W']."""
    parts = every(x, own)
    return torch.bmm(weights.to(parts.dtype)[:, None], parts.flatten(2)).view(len(x), *parts.shape[2:])


def every(x: Tensor, own: Experts) -> Tensor:
    """Every expert's output on every image, by one wide convolution: [B, C, H, W] -> [B, N, K, H', W']."""
    wide = conv2d(x, own.bank, stride=own.stride, padding=own.padding)
    parts: Tensor
    if own.starts == tuple(range(0, wide.shape[1], own.width)):
        parts = wide.unflatten(1, (len(own.starts), own.width))
    else:
        parts = torch.stack([aligned(wide, start, own.width, dim=1) for start in own.starts], dim=1)
    if own.bias is not None:
        parts = parts + own.bias.to(parts.dtype)[:, :, None, None]
    return parts


def aligned(stack: Tensor, start: int, width: int, dim: int = 0) -> Tensor:
    """The window of `width` from `start` along `dim`, each entry m at place m mod `width`."""
    turn = start % width
    if turn == 0:
        return stack.narrow(dim, start, width)
    return torch.cat([stack.narrow(dim, start + width - turn, turn), stack.narrow(dim, start, width - turn)], dim=dim)

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
class FilterBank:
    """The filters of one layer's experts: `filters` [M, C, k, k] and `bias` [N, K] or None.

    Expert e has the filters from `starts[e]` on, `width` of them. `dispatch` names how the layer runs them.
    """

    filters: Tensor
    starts: Windows
    width: int
    stride: int
    bias: Tensor | None = None
    dispatch: str = "auto"

    def convolve(self, x: Tensor, expert: int) -> Tensor:
        """One expert on all images: [B, C, H, W] -> [B, K, H', W']."""
        bias = None if self.bias is None else self.bias[expert].to(x.dtype)
        return conv2d(x, self.of_expert(expert), bias, self.stride, self.padding)

    def of_expert(self, expert: int) -> Tensor:
        """Filters [K, C, k, k] of one expert, in the order of its output channels."""
        return aligned(self.filters, self.starts[expert], self.width)

    @property
    def padding(self) -> int:
        return self.filters.shape[-1] // 2


def mixture(x: Tensor, bank: FilterBank, weights: Tensor) -> Tensor:
    """Every expert on every image, summed with `weights` [B, N]: [B, C, H, W] -> [B, K, H', W']."""
    parts = every_expert(x, bank)
    return torch.bmm(weights.to(parts.dtype)[:, None], parts.flatten(2)).view(len(x), *parts.shape[2:])


def every_expert(x: Tensor, bank: FilterBank) -> Tensor:
    """Every expert's output on every image, by one wide convolution: [B, C, H, W] -> [B, N, K, H', W']."""
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
    """The window of `width` from `start` along `dim`, each entry m at place m mod `width`."""
    turn = start % width
    if turn == 0:
        return stack.narrow(dim, start, width)
    return torch.cat([stack.narrow(dim, start + width - turn, turn), stack.narrow(dim, start, width - turn)], dim=dim)

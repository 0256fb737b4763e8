"""Routed convolutions as pure functions of inputs, filter bank and routing decision.

Shapes: B pictures, N experts, K filters an expert, M filters in the bank. Expert e owns the window
bank[starts[e] : starts[e] + K]; filter m writes output channel m mod K, so a filter that two experts share stands in
the same channel of both.
"""

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


def chosen(x: Tensor, bank: Tensor, starts: Windows, width: int, experts: Tensor, stride: int) -> Tensor:
    """Each picture through its own expert's filters, nothing else computed: sort by expert, split, join.

    x [B, C, H, W], bank [M, C, k, k], experts [B] int64 -> [B, K, H', W'].
    """
    pad = bank.shape[-1] // 2
    counts = torch.bincount(experts, minlength=len(starts)).tolist()
    present = [e for e, count in enumerate(counts) if count] or [0]  # an empty batch keeps its shapes
    filters = [aligned(bank, starts[e], width) for e in present]
    if len(present) == 1:
        return conv2d(x, filters[0], stride=stride, padding=pad)
    order = experts.argsort()
    parts = x[order].split([counts[e] for e in present])
    joined = torch.cat([conv2d(part, f, stride=stride, padding=pad) for part, f in zip(parts, filters, strict=True)])
    return joined[order.argsort()]


def mixture(x: Tensor, bank: Tensor, starts: Windows, width: int, weights: Tensor, stride: int) -> Tensor:
    """Every expert on every picture, summed with `weights` [B, N]: one wide convolution over the bank, then windows.

    x [B, C, H, W], bank [M, C, k, k] -> [B, K, H', W'].
    """
    wide = conv2d(x, bank, stride=stride, padding=bank.shape[-1] // 2)
    weights = weights.to(wide.dtype)
    if starts == tuple(range(0, len(wide[0]), width)):
        return torch.bmm(weights[:, None], wide.flatten(2).reshape(len(x), len(starts), -1)).view(len(x), width, *wide.shape[2:])
    weights = weights[:, :, None, None, None]
    return torch.stack([aligned(wide, s, width, dim=1) * weights[:, e] for e, s in enumerate(starts)]).sum(dim=0)


def every(x: Tensor, bank: Tensor, starts: Windows, width: int, stride: int) -> Tensor:
    """Every expert's output on every picture, by one wide convolution: [B, C, H, W] -> [B, N, K, H', W']."""
    wide = conv2d(x, bank, stride=stride, padding=bank.shape[-1] // 2)
    return torch.stack([aligned(wide, start, width, dim=1) for start in starts], dim=1)


def aligned(stack: Tensor, start: int, width: int, dim: int = 0) -> Tensor:
    """The window of `width` from `start` along `dim`, each entry m at place m mod `width`."""
    turn = start % width
    if turn == 0:
        return stack.narrow(dim, start, width)
    return torch.cat([stack.narrow(dim, start + width - turn, turn), stack.narrow(dim, start, width - turn)], dim=dim)

"""The slow twin of MoEConv2d: a separate convolution for each expert, whose outputs are weighted and summed."""

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, one_hot

from advmoe.moe import ForcedGate, Gate, HardGate, MoEConv2d, ScaledGate, SoftGate, StraightThroughGate


def expert_filters(bank: str, num_experts: int, out_channels: int, width: int) -> list[list[int]]:
    """For each expert, the rows of the filter bank in the order of the output channels they write."""
    if bank == "disjoint":
        windows = [range(e * width, (e + 1) * width) for e in range(num_experts)]
    else:
        gap = (out_channels - width) / (num_experts - 1) if num_experts > 1 else 0.0
        firsts = [math.floor(e * gap + 0.5) for e in range(num_experts)]
        windows = [range(first, first + width) for first in firsts]
    allocated = sorted({m for window in windows for m in window})
    rows = [[allocated.index(m) for m in window] for window in windows]
    return [sorted(window, key=lambda row: row % width) for window in rows]


def router_logits(layer: MoEConv2d, x: Tensor) -> Tensor:
    """Logits [B, N] in eval mode."""
    router = layer.router
    standardised = (x.sum(dim=(2, 3)) / (x.shape[2] * x.shape[3]) - router.mean) / (router.var + 1e-5).sqrt()
    return standardised @ router.linear.weight.T + router.linear.bias


def gate_weights(logits: Tensor, gate: Gate, layer: int) -> Tensor:
    """Expert weights [B, N]."""
    top1 = one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits)
    if isinstance(gate, HardGate):
        return top1
    if isinstance(gate, ForcedGate):
        column = gate.route[:, layer].tolist()
        rows = [top1[b] if e < 0 else torch.eye(logits.shape[1]).to(logits)[e] for b, e in enumerate(column)]
        return torch.stack(rows)
    p = (logits / gate.temperature).exp() / (logits / gate.temperature).exp().sum(dim=1, keepdim=True)
    return {
        SoftGate: p,
        StraightThroughGate: top1 + (p - p.detach()),
        ScaledGate: top1 * (1 + (p - p.detach())),
    }[type(gate)]


def masked(layer: MoEConv2d, bank: str, out_channels: int, x: Tensor, gate: Gate) -> Tensor:
    """The slow form of `layer` in eval mode: [B, C, H, W] -> [B, K, H', W']."""
    weights = gate_weights(router_logits(layer, x), gate, layer.index)
    y = 0
    for e, rows in enumerate(expert_filters(bank, layer.num_experts, out_channels, layer.width)):
        filters = layer.filters[rows]
        y = y + weights[:, e, None, None, None] * conv2d(x, filters, stride=layer.stride, padding=filters.shape[-1] // 2)
    return y

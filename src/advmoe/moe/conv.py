"""The convolution of a block, in its dense and its MoE form, behind one signature: (x, gate) -> (y, routings)."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from advmoe.errors import UserError
from advmoe.moe import dispatch
from advmoe.moe.routing import Gate, Router, Routing

Bank = Literal["backbone", "disjoint"]
Routings = tuple[Routing, ...]


class DenseConv2d(nn.Conv2d):
    """A plain convolution that takes a gate and routes nothing."""

    def forward(self, x: Tensor, gate: Gate) -> tuple[Tensor, Routings]:  # type: ignore[override]
        return super().forward(x), ()


class MoEConv2d(nn.Module):
    """A convolution whose filters are picked per picture (SPEC: expert banks; appendix A and Fig. A1).

    All experts start as the same filters and part as their pictures differ, so that early on, when routes still jump,
    a changed route changes no output (docs/choices.md has the figures).

    `index` is the layer's place among the network's MoE layers; a forced gate reads its column of the route by it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, width: int, *, num_experts: int, bank: Bank, kernel_size: int, stride: int
    ) -> None:
        super().__init__()
        self.in_channels, self.width, self.num_experts, self.stride = in_channels, width, num_experts, stride
        self.starts, size = dispatch.windows(bank, num_experts, out_channels, width)
        first = nn.init.kaiming_uniform_(torch.empty(width, in_channels, kernel_size, kernel_size), a=math.sqrt(5))
        self.filters = nn.Parameter(first[torch.arange(size) % width])
        self.router = Router(in_channels, num_experts)
        self.index = 0

    def forward(self, x: Tensor, gate: Gate) -> tuple[Tensor, Routings]:
        """[B, C, H, W] -> [B, K, H', W'] and this layer's Routing."""
        logits = self.router(x)
        weights = gate.weights(logits, self.index)
        if weights.mixture is not None:
            y = dispatch.mixture(x, self.filters, self.starts, self.width, weights.mixture, self.stride)
        else:
            y = dispatch.chosen(x, self.filters, self.starts, self.width, weights.experts, self.stride)
        if weights.factor is not None:
            y = y * weights.factor.to(y.dtype)[:, None, None, None]
        return y, (Routing(logits, weights.experts),)

    @torch.no_grad()
    def tie_gradients(self) -> None:
        """Give every filter of one output channel the sum of their gradients, so that equal experts stay equal."""
        gradient = self.filters.grad
        if gradient is None:
            return
        channel = torch.arange(len(gradient), device=gradient.device) % self.width
        total = gradient.new_zeros(self.width, *gradient.shape[1:]).index_add_(0, channel, gradient)
        gradient.copy_(total[channel])


@dataclass(frozen=True)
class Widths:
    """How a backbone's dense channel counts become a network's: int(scale * channels), the stem apart."""

    scale: float = 1.0
    stem_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise UserError(f"model_scale must be in (0, 1], not {self.scale}")

    def width(self, channels: int) -> int:
        """Channels of a layer that has `channels` in the dense network. Raises UserError where none is left."""
        return _scaled(channels, self.scale)

    def stem_width(self, channels: int) -> int:
        """The same for the first convolution."""
        return _scaled(channels, self.stem_scale)


@dataclass(frozen=True)
class DenseKind(Widths):
    """Networks of plain convolutions: dense at scale 1, small dense below it."""

    def conv(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Module:
        """A block's convolution from `in_channels` (as they are) to width(out_channels)."""
        width = self.width(out_channels)
        return DenseConv2d(in_channels, width, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)


@dataclass(frozen=True)
class MoEKind(Widths):
    """Networks of routed convolutions; the stem keeps its dense width."""

    num_experts: int = 2
    bank: Bank = "backbone"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts < 1:
            raise UserError(f"num_experts must be at least 1, not {self.num_experts}")
        if self.bank not in get_args(Bank):
            raise UserError(f"bank must be one of {', '.join(get_args(Bank))}, not {self.bank}")

    def conv(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Module:
        """A block's MoE convolution from `in_channels` (as they are) to width(out_channels)."""
        return MoEConv2d(
            in_channels, out_channels, self.width(out_channels),
            num_experts=self.num_experts, bank=self.bank, kernel_size=kernel_size, stride=stride,
        )  # fmt: skip


Kind = DenseKind | MoEKind


def _scaled(channels: int, scale: float) -> int:
    if int(scale * channels + 1e-9) < 1:  # 1e-9: 0.2 * 15 is 3.0000000000000004, 0.29 * 100 is 28.999999999999996
        raise UserError(f"model_scale {scale} leaves a layer of {channels} channels none: at least {1 / channels:.3g} is needed")
    return int(scale * channels + 1e-9)

"""Convolutions, plain and routed. Each brings its batch norm where one follows it.

In a block, both have one signature: (x, gate, logits, onto) -> (y, routings). `logits` are the network router's, if it has
one. `onto` is a tensor of y's shape, such as a residual stream: with it, y is the sum of both, and its memory may be overwritten.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from advmoe.moe.channels import Channels
from advmoe.moe.dispatch import add_chosen, run_chosen
from advmoe.moe.experts import FilterBank, Windows, every_expert, mixture
from advmoe.moe.guards import check_call
from advmoe.moe.norm import ExpertNorm
from advmoe.moe.routing import Chosen, Gate, Mixed, OneHot, Router, Routing, Scaled

Routings = tuple[Routing, ...]


class PlainConv2d(nn.Conv2d):
    """A convolution, and its batch norm if it has one: [B, C, H, W] -> [B, C', H', W']."""

    def __init__(self, inputs: Channels, outputs: Channels, kernel_size: int, stride: int, norm: nn.Module | None) -> None:
        padding = kernel_size // 2
        super().__init__(inputs.width, outputs.width, kernel_size, stride=stride, padding=padding, bias=False)
        self.inputs, self.outputs, self.norm = inputs, outputs, norm

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.norm is None else self.norm(y)


class DenseConv2d(PlainConv2d):
    """A block's plain convolution: takes a gate and routes nothing."""

    def forward(  # type: ignore[override]
        self, x: Tensor, gate: Gate, logits: Tensor | None = None, onto: Tensor | None = None
    ) -> tuple[Tensor, Routings]:
        y = super().forward(x)
        return y if onto is None else y.add_(onto), ()


class MoEConv2d(nn.Module):
    """A convolution whose filters are picked per image (appendix A and Fig. A1).

    All experts start as the same filters and part as their images differ, so that early on, when routes still jump,
    a changed route changes no output (docs/choices.md has the figures).

    `index` is the layer's column in a route. A layer without a router follows the network's.
    """

    def __init__(
        self, inputs: Channels, outputs: Channels, windows: tuple[Windows, int], *,
        kernel_size: int, stride: int, norm: nn.Module | None, routed: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.width, self.stride = inputs.width, outputs.width, stride
        self.starts, size = windows
        self.num_experts = len(self.starts)
        first = nn.init.kaiming_uniform_(torch.empty(self.width, inputs.width, kernel_size, kernel_size), a=math.sqrt(5))
        self.filters = nn.Parameter(first[torch.arange(size) % self.width])
        self.router = Router(inputs.width, self.num_experts) if routed else None
        self.bias: nn.Parameter | None = None  # [N, K], once the norm is folded in (advmoe.models.fused)
        self.norm, self.own_norms = norm, isinstance(norm, ExpertNorm)
        self.index = 0
        self.dispatch = "auto"  # how its convolution is run (advmoe.moe.dispatch)

    def forward(self, x: Tensor, gate: Gate, logits: Tensor | None = None, onto: Tensor | None = None) -> tuple[Tensor, Routings]:
        """[B, C, H, W] -> [B, K, H', W'], and this layer's Routing if it has a router. If not, `logits` [B, N] are the network
        router's. With `onto` [B, K, H', W'], the result is the sum of both."""
        check_call(x, self.training)
        own_logits = logits if self.router is None else self.router(x)
        if own_logits is None:
            raise ValueError("an MoE layer without a router needs the network router's logits: layer(x, gate, logits)")
        weights = gate.weights(own_logits, self.index)
        if onto is None:
            y = self._routed(x, weights)
        elif type(weights) is Chosen and self.norm is None and not torch.is_grad_enabled():
            y = add_chosen(x, self.bank, weights.experts, onto)
        else:
            y = self._routed(x, weights).add_(onto)
        return y, () if self.router is None else (Routing(own_logits, weights.experts),)

    def _routed(self, x: Tensor, weights: Chosen) -> Tensor:
        """Convolve and normalise as the gate's weights say."""
        match weights:
            case OneHot() | Mixed() if isinstance(self.norm, ExpertNorm):
                return self._every(x, weights)
            case Scaled():
                return self._scaled(x, weights.experts, weights.factor[:, None, None, None])
            case Mixed():
                y = mixture(x, self.bank, weights.mixture)
            case OneHot():
                y = run_chosen(x, self.bank, weights.experts, weights.mixture)
            case _:
                y = run_chosen(x, self.bank, weights.experts)
        return self._normalised(y, weights.experts)

    def _scaled(self, x: Tensor, experts: Tensor, factor: Tensor) -> Tensor:
        """The chosen experts' outputs times `factor`: after a norm that is the expert's own, before one that is shared."""
        if self.own_norms:
            y = self._normalised(run_chosen(x, self.bank, experts), experts)
            return y * factor.to(y.dtype)
        y = run_chosen(x, replace(self.bank, bias=None), experts)
        y = y * factor.to(y.dtype)
        return self._normalised(y if self.bias is None else y + self.bias[experts][:, :, None, None].to(y.dtype), experts)

    def _normalised(self, y: Tensor, experts: Tensor) -> Tensor:
        if isinstance(self.norm, ExpertNorm):
            y = self.norm(y, experts)
        elif self.norm is not None:
            y = self.norm(y)
        return y

    def _every(self, x: Tensor, weights: OneHot | Mixed) -> Tensor:
        """Normalise every expert's output by its own norm, then mix."""
        assert isinstance(self.norm, ExpertNorm)
        parts = self.norm.every(every_expert(x, self.bank), weights.experts)
        return torch.einsum("bn,bnkhw->bkhw", weights.mixture.to(parts.dtype), parts)

    @property
    def bank(self) -> FilterBank:
        """The filters of the layer and how they are run."""
        return FilterBank(self.filters, self.starts, self.width, self.stride, self.bias, self.dispatch)

    @torch.no_grad()
    def tie_gradients(self) -> None:
        """Give what is each expert's own the sum of the experts' gradients, so that equal experts stay equal."""
        if self.filters.grad is not None:
            _tie(self.filters.grad, self.width)
        if self.bias is not None and self.bias.grad is not None:
            _tie(self.bias.grad, 1)
        if isinstance(self.norm, ExpertNorm):
            for gradient in (self.norm.weight.grad, self.norm.bias.grad):
                if gradient is not None:
                    _tie(gradient, 1)


def _tie(gradient: Tensor, period: int) -> None:
    """Sum the rows that stand `period` apart, and give each of them the sum."""
    row = torch.arange(len(gradient), device=gradient.device) % period
    total = gradient.new_zeros(period, *gradient.shape[1:]).index_add_(0, row, gradient)
    gradient.copy_(total[row])

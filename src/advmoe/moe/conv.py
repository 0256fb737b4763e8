"""Convolutions, plain and routed. Each includes the batch norm that follows it, if there is one.

In a block, both have the same signature: (x, gate, logits, onto) -> (y, routings). `logits` come from a router that layers share;
they are None if there is none. `onto` is a tensor in the shape of y, such as a residual stream, that is added to y.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from advmoe.moe.channels import Channels
from advmoe.moe.dispatch import run_chosen
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
        """[B, C, H, W] -> [B, C', H', W']."""
        y = super().forward(x)
        return y if self.norm is None else self.norm(y)


class DenseConv2d(PlainConv2d):
    """The plain convolution of a block. It takes a gate like a routed one, but ignores it and returns no routings."""

    def forward(  # type: ignore[override]
        self, x: Tensor, gate: Gate, logits: Tensor | None = None, onto: Tensor | None = None
    ) -> tuple[Tensor, Routings]:
        """[B, C, H, W] -> [B, C', H', W'], plus `onto` of that shape if it is given; and no routings."""
        y = super().forward(x)
        return y if onto is None else y.add_(onto), ()


class MoEConv2d(nn.Module):
    """A convolution whose filters are chosen for each image by a router (appendix A and Fig. A1 of the AdvMoE paper).

    All experts start with the same filters. Unless they are tied (`training.tied_share`), they differ from the first update on,
    because they are trained on different images (docs/choices.md has figures).

    `index` is the column of the layer's router in a route. A layer without a router gets logits, of one that layers share.
    """

    def __init__(
        self, inputs: Channels, windows: Windows, *, kernel_size: int, stride: int, norm: nn.Module | None, routed: bool
    ) -> None:
        super().__init__()
        self.in_channels, self.stride = inputs.width, stride
        self.starts, self.width, size = windows
        self.num_experts = len(self.starts)
        first = nn.init.kaiming_uniform_(torch.empty(self.width, inputs.width, kernel_size, kernel_size), a=math.sqrt(5))
        self.filters = nn.Parameter(first[torch.arange(size) % self.width])
        self.router = Router(inputs.width, self.num_experts) if routed else None
        self.bias: nn.Parameter | None = None  # [N, K], of a converted layer, or once the norm is folded in (advmoe.models.fused)
        self.norm = norm
        self.norm_shared = norm is not None and not isinstance(norm, ExpertNorm)  # stays True after the norm is folded in
        self.index = 0
        self.dispatch = "auto"  # how its convolution is run (advmoe.moe.dispatch)

    def forward(self, x: Tensor, gate: Gate, logits: Tensor | None = None, onto: Tensor | None = None) -> tuple[Tensor, Routings]:
        """[B, C, H, W] -> [B, K, H', W'], and the layer's Routing if it has a router.

        A layer without a router needs `logits` [B, N] of a router that layers share. `onto` [B, K, H', W'] is added to the result.
        Raises ValueError if neither a router nor `logits` is there, and RuntimeError if a tool traces the layer, or
        transforms it in train mode (`check_call`).
        """
        check_call(x, self.training)
        routing_logits = logits if self.router is None else self.router(x)
        if routing_logits is None:
            raise ValueError("an MoE layer without a router needs the logits of a shared one: layer(x, gate, logits)")
        weights = gate.weights(routing_logits, self.index)
        y = self._routed(x, weights)
        if onto is not None:
            y = y.add_(onto)
        return y, () if self.router is None else (Routing(routing_logits, weights.experts),)

    def _routed(self, x: Tensor, weights: Chosen) -> Tensor:
        """Convolve and normalise with the weights of the gate."""
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
        """The chosen experts' outputs times `factor`: before a norm that all share, otherwise after bias and norm."""
        if not self.norm_shared:
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
        """Normalise the output of every expert with the norm of that expert, then mix the outputs."""
        assert isinstance(self.norm, ExpertNorm)
        parts = self.norm.every(every_expert(x, self.bank), weights.experts)
        return torch.einsum("bn,bnkhw->bkhw", weights.mixture.to(parts.dtype), parts)

    @property
    def bank(self) -> FilterBank:
        """The filters of the layer and how they are run."""
        return FilterBank(self.filters, self.starts, self.width, self.stride, self.bias, self.dispatch)

    @torch.no_grad()
    def tie_gradients(self) -> None:
        """Set the gradients of each expert's parameters to their sum over the experts, so that equal parameters stay equal."""
        of_norm = (self.norm.weight, self.norm.bias) if isinstance(self.norm, ExpertNorm) else ()
        for parameter, period in [(self.filters, self.width), *((parameter, 1) for parameter in (self.bias, *of_norm))]:
            if parameter is not None and parameter.grad is not None:
                _tie(parameter.grad, period)


def _tie(gradient: Tensor, period: int) -> None:
    """Replace each row by the sum of all rows that are a multiple of `period` apart from it."""
    row = torch.arange(len(gradient), device=gradient.device) % period
    total = gradient.new_zeros(period, *gradient.shape[1:]).index_add_(0, row, gradient)
    gradient.copy_(total[row])

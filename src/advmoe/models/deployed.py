"""A copy of a network only for inference, with the fewest operators.

Shapes: B images, C and K channels, N experts.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from advmoe.models.fused import fold_routers, fused
from advmoe.moe import Chosen, Gate, MoEConv2d, RoutedNetwork, Routing, Routings
from advmoe.moe.dispatch.split import add_groups, groups_of, run_groups

Network = TypeVar("Network", bound=RoutedNetwork)


@torch.no_grad()
def deployed(model: Network) -> Network:
    """A copy in eval mode that computes the same logits and routes, up to rounding, as fast as possible.

    Batch norms are folded into the convolutions and standardisation into the routers, all parameters are frozen, and tensors are
    channels last. Each MoE layer is a `RoutedConv2d`: it runs the chosen experts (split dispatch), supports only hard and forced
    gates, and is not in `moe_layers()`. Use `fused` for a copy whose routers learn or that supports other gates.
    """
    copy = fused(model)
    fold_routers(copy)
    for parent in list(copy.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MoEConv2d):
                setattr(parent, name, RoutedConv2d(child))
    copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copy.requires_grad_(False)


class RoutedConv2d(nn.Module):
    """A fused MoE layer for inference. Each expert is a separate convolution, which runs on the images that chose it."""

    def __init__(self, layer: MoEConv2d) -> None:
        super().__init__()
        self.index = layer.index
        self.router = layer.router
        self.experts = nn.ModuleList(_convolution(layer, e) for e in range(layer.num_experts))

    def forward(self, x: Tensor, gate: Gate, logits: Tensor | None = None, onto: Tensor | None = None) -> tuple[Tensor, Routings]:
        """[B, C, H, W] -> [B, K, H', W'], plus `onto` if given; and the layer's Routing if the layer has a router.

        Raises TypeError if the gate runs more than the chosen experts.
        """
        if self.router is not None:
            logits = self.router(x)
        assert logits is not None
        weights = gate.weights(logits, self.index)
        if type(weights) is not Chosen:
            raise TypeError(
                f"a deployed network takes hard and forced gates, not {type(gate).__name__}; advmoe.models.fused takes all"
            )
        y = self.convolve(x, weights.experts, onto)
        return y, () if self.router is None else (Routing(logits, weights.experts),)

    def convolve(self, x: Tensor, experts: Tensor, onto: Tensor | None) -> Tensor:
        """Each image through its expert, plus `onto` if given."""
        groups = groups_of(experts, len(self.experts))
        return run_groups(x, groups, self._expert) if onto is None else add_groups(x, groups, self._expert, onto)

    def _expert(self, x: Tensor, expert: int) -> Tensor:
        y: Tensor = self.experts[expert](x)
        return y


def _convolution(layer: MoEConv2d, expert: int) -> nn.Conv2d:
    filters = layer.bank.of_expert(expert)
    width, inputs, size, _ = filters.shape
    convolution = nn.Conv2d(inputs, width, size, layer.stride, layer.bank.padding, bias=layer.bias is not None, device="meta")
    convolution.weight = nn.Parameter(filters.detach().clone())  # a copy: in a file, a view would bring the full bank
    if layer.bias is not None:
        convolution.bias = nn.Parameter(layer.bias[expert].detach().clone())
    return convolution

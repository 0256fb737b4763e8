"""A form of a network that can be traced: a pure function of the pixels, for any batch size, that runs only the chosen experts.

Shapes: B images, N experts, K filters an expert, L MoE layers.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from advmoe.models import Classifier, fused
from advmoe.moe import Gate, MoEConv2d, Router, Routing, Routings

TRACED = 2  # images in the traced batch: torch.export would treat 0 and 1 as constants


class RoutedConv2d(nn.Module):
    """A fused MoE layer. Each expert is a separate convolution, run on the images that chose it, which may be none."""

    def __init__(self, layer: MoEConv2d) -> None:
        super().__init__()
        self.router = None if layer.router is None else folded(layer.router)
        self.experts = nn.ModuleList(_convolution(layer, e) for e in range(layer.num_experts))

    def forward(self, x: Tensor, gate: Gate, logits: Tensor | None = None, onto: Tensor | None = None) -> tuple[Tensor, Routings]:
        """[B, C, H, W] -> [B, K, H', W'], plus `onto` if given; and the layer's Routing if the layer has a router."""
        if self.router is not None:
            logits = self.router(x.mean(dim=(2, 3), dtype=torch.float32))
        assert logits is not None
        chosen = logits.argmax(dim=1)
        y = self._dispatched(x, chosen)
        return y if onto is None else y.add_(onto), () if self.router is None else (Routing(logits, chosen),)

    def _dispatched(self, x: Tensor, chosen: Tensor) -> Tensor:
        rows = [(chosen == e).nonzero().flatten() for e in range(len(self.experts))]
        parts = [convolve(x.index_select(0, of_expert)) for convolve, of_expert in zip(self.experts, rows, strict=True)]
        positions = chosen.argsort(stable=True).argsort()  # of each image in the batch grouped by expert
        return torch.cat(parts).index_select(0, positions)


def _convolution(layer: MoEConv2d, expert: int) -> nn.Conv2d:
    filters = layer.bank.of_expert(expert)
    width, inputs, size, _ = filters.shape
    convolution = nn.Conv2d(inputs, width, size, layer.stride, layer.bank.padding, bias=layer.bias is not None)
    convolution.weight = nn.Parameter(filters.detach().clone())  # a copy: with a view the file would contain the full bank
    if layer.bias is not None:
        convolution.bias = nn.Parameter(layer.bias[expert].detach().clone())
    return convolution


@torch.no_grad()
def folded(router: Router) -> nn.Linear:
    """The router after its pooling as one linear layer [B, C] -> [B, N]: the standardisation is folded in."""
    rate = (router.var.double() + 1e-5).rsqrt()
    weight = router.linear.weight.double() * rate
    linear = nn.Linear(router.linear.in_features, router.linear.out_features)
    linear.weight.copy_(weight)
    linear.bias.copy_(router.linear.bias.double() - weight @ router.mean.double())
    return linear


@torch.no_grad()
def lower(network: Classifier, dtype: torch.dtype) -> None:
    """Change the convolutions to `dtype`, in place. Their outputs have that dtype, as under autocast.

    Routers and linear layers keep their dtype.
    """
    routers = set() if network.router is None else set(network.router.modules())
    for layer in network.modules():
        if layer in routers:
            continue
        if isinstance(layer, nn.Conv2d):
            layer.to(dtype).register_forward_pre_hook(partial(_cast, dtype=dtype))
        elif isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(partial(_cast, dtype=layer.weight.dtype))


def _cast(layer: nn.Module, arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of the layer, with the first one, the images, cast to `dtype`."""
    return (arguments[0].to(dtype), *arguments[1:])


class Traceable(nn.Module):
    """A fused copy of a network: pixels [B, C, H, W] -> logits [B, classes] and, for an MoE network, routes [B, L] int64.

    Logits are float32 for every `dtype` of the convolutions.
    """

    def __init__(self, model: Classifier, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.network = fused(model).float().cpu()
        self.routed = bool(self.network.moe_layers())
        for parent in list(self.network.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, MoEConv2d):
                    setattr(parent, name, RoutedConv2d(child))
        if dtype is not torch.float32:
            lower(self.network, dtype)
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        logits, routings = self.network.forward_routed(pixels)
        logits = logits.float()  # a network that ends in a convolution may return `dtype`
        return (logits, torch.stack([routing.experts for routing in routings], dim=1)) if self.routed else (logits,)


def traced(model: Classifier, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> ExportedProgram:
    """The network's graph for any number of images of `shape` (C, H, W), with its weights. The convolutions run in `dtype`."""
    pixels = torch.rand(TRACED, *shape, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Traceable(model, dtype), (pixels,), dynamic_shapes={"pixels": {0: Dim.DYNAMIC}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it contains paths of this machine
    return program

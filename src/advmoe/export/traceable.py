"""A form of a network that can be traced: a pure function of the pixels, for any batch size, that runs only the chosen experts.

Shapes: B images, L MoE layers.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from advmoe.models import Classifier, fused
from advmoe.models.fused import fold_routers
from advmoe.models.routed import RoutedConv2d, is_replaceable
from advmoe.moe import MoEConv2d
from advmoe.moe.copies import copied
from advmoe.moe.replace import replace_modules

TRACED = 2  # images in the traced batch: torch.export would treat 0 and 1 as constants


class TraceableConv2d(RoutedConv2d):
    """A fused MoE layer whose experts all run, each on the images that chose it, which may be none."""

    def convolve(self, x: Tensor, experts: Tensor, onto: Tensor | None) -> Tensor:
        rows = [(experts == e).nonzero().flatten() for e in range(len(self.experts))]
        parts = [expert(x.index_select(0, of_expert)) for expert, of_expert in zip(self.experts, rows, strict=True)]
        positions = experts.argsort(stable=True).argsort()  # of each image in the batch grouped by expert
        y = torch.cat(parts).index_select(0, positions)
        return y if onto is None else y.add_(onto)


@torch.no_grad()
def lower(network: Classifier, dtype: torch.dtype) -> None:
    """Change the convolutions to `dtype`, in place. Their outputs have that dtype, as under autocast.

    Routers, linear layers and PReLUs keep their dtype.
    """
    routers = set() if network.router is None else set(network.router.modules())
    for layer in network.modules():
        if layer in routers:
            continue
        if isinstance(layer, nn.Conv2d):
            layer.to(dtype).register_forward_pre_hook(partial(_cast, dtype=dtype))
        elif isinstance(layer, nn.Linear | nn.PReLU):
            layer.register_forward_pre_hook(partial(_cast, dtype=layer.weight.dtype))


def _cast(layer: nn.Module, arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of the layer, with the first one, the images, cast to `dtype`."""
    return (arguments[0].to(dtype), *arguments[1:])


def _traceable(module: nn.Module) -> nn.Module:
    """An MoE layer's form for tracing. A user's subclass is returned unchanged: in it every expert runs on every image."""
    return TraceableConv2d(module) if type(module) is MoEConv2d and is_replaceable(module) else module


class Traceable(nn.Module):
    """A fused copy of a network: pixels [B, C, H, W] -> logits [B, classes] and, for an MoE network, routes [B, L] int64.

    Logits are float32 for every `dtype` of the convolutions.
    """

    def __init__(self, model: Classifier, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.network = fused(copied(model)).float().cpu()  # fused() shares the routers with its argument
        fold_routers(self.network)
        self.routed = bool(self.network.moe_layers())
        replace_modules(self.network, _traceable)
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

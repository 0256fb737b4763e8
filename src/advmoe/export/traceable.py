"""A network as a graph can hold it: a pure function of the pixels, at any batch, that computes the chosen experts only.

Shapes: B images, N experts, K filters an expert, L MoE layers.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from advmoe.models import Classifier, fused
from advmoe.moe import Gate, MoEConv2d, Router, Routing, Routings

TRACED = 2  # images in the traced batch: 0 and 1 would be taken for constants


class RoutedConv2d(nn.Module):
    """A fused MoE layer. Each expert is a convolution of its own on the rows of the batch that chose it, perhaps none."""

    def __init__(self, layer: MoEConv2d) -> None:
        super().__init__()
        self.router = None if layer.router is None else folded(layer.router)
        self.experts = nn.ModuleList(_convolution(layer, e) for e in range(layer.num_experts))

    def forward(self, x: Tensor, gate: Gate, logits: Tensor | None = None, onto: Tensor | None = None) -> tuple[Tensor, Routings]:
        """[B, C, H, W] -> [B, K, H', W'], plus `onto` if given, and this layer's Routing where it has a router of its own."""
        if self.router is not None:
            logits = self.router(x.mean(dim=(2, 3), dtype=torch.float32))
        assert logits is not None
        chosen = logits.argmax(dim=1)
        y = self._dispatched(x, chosen)
        return y if onto is None else y.add_(onto), () if self.router is None else (Routing(logits, chosen),)

    def _dispatched(self, x: Tensor, chosen: Tensor) -> Tensor:
        rows = [(chosen == e).nonzero().flatten() for e in range(len(self.experts))]
        parts = [convolve(x.index_select(0, own)) for convolve, own in zip(self.experts, rows, strict=True)]
        places = chosen.argsort(stable=True).argsort()  # where each image stands once they are grouped by expert
        return torch.cat(parts).index_select(0, places)


def _convolution(layer: MoEConv2d, expert: int) -> nn.Conv2d:
    filters = layer.bank.of_expert(expert)
    width, inputs, size, _ = filters.shape
    made = nn.Conv2d(inputs, width, size, layer.stride, layer.bank.padding, bias=layer.bias is not None)
    made.weight = nn.Parameter(filters.detach().clone())  # no view of the bank, which a file would hold whole
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias[expert].detach().clone())
    return made


@torch.no_grad()
def folded(router: Router) -> nn.Linear:
    """The router behind the pooling, its standardisation folded into the linear layer: [B, C] -> [B, N]."""
    rate = (router.var.double() + 1e-5).rsqrt()
    weight = router.linear.weight.double() * rate
    made = nn.Linear(router.linear.in_features, router.linear.out_features)
    made.weight.copy_(weight)
    made.bias.copy_(router.linear.bias.double() - weight @ router.mean.double())
    return made


@torch.no_grad()
def lower(network: Classifier, dtype: torch.dtype) -> None:
    """Run the convolutions in `dtype`; what follows keeps it, as under autocast. Routers and linear layers stay as they are."""
    routers = set() if network.router is None else set(network.router.modules())
    for layer in network.modules():
        if layer in routers:
            continue
        if isinstance(layer, nn.Conv2d):
            layer.to(dtype).register_forward_pre_hook(partial(_cast, dtype=dtype))
        elif isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(partial(_cast, dtype=layer.weight.dtype))


def _cast(layer: nn.Module, given: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The layer's arguments, the images among them in `dtype`."""
    return (given[0].to(dtype), *given[1:])


class Traceable(nn.Module):
    """A fused twin of a network: pixels [B, C, H, W] -> logits [B, classes] and, of an MoE network, routes [B, L] int64.

    Logits are float32, whatever the convolutions' `dtype`.
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
        logits = logits.float()  # of a network that ends in a convolution
        return (logits, torch.stack([routing.experts for routing in routings], dim=1)) if self.routed else (logits,)


def traced(model: Classifier, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> ExportedProgram:
    """The network's graph for any number of images of `shape` (C, H, W), with its weights; the convolutions in `dtype`."""
    pixels = torch.rand(TRACED, *shape, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Traceable(model, dtype), (pixels,), dynamic_shapes={"pixels": {0: Dim.DYNAMIC}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names source files of this machine
    return program

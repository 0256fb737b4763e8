"""A network for use: batch norms that directly follow a convolution folded into its filters."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from advmoe.moe import ExpertNorm, MaskedNorm, MoEConv2d, PlainConv2d, RoutedNetwork
from advmoe.moe.convert.prepare import bake, copied

Network = TypeVar("Network", bound=RoutedNetwork)


@torch.no_grad()
def fused(model: Network) -> Network:
    """A copy in eval mode that gives the same logits and routes (but for rounding) in less time.

    Its router parameters are the model's own, so that they can be learned through it; all else is copied and frozen.
    """
    routers = {id(parameter): parameter for parameter in model.router_parameters()}
    twin = copied(model, dict(routers)).eval()
    shared = {module for router in _routers(twin) for module in router.modules()}
    for module in twin.modules():
        if module not in shared:
            bake(module)  # pruned or reparametrised weights
    for parameter in (*twin.weight_parameters(), *twin.mask_parameters()):
        parameter.requires_grad_(False)
    for layer in twin.modules():
        if isinstance(layer, MoEConv2d) and layer.norm is not None:
            filters, bias = _folded(layer)
            if isinstance(layer.norm, ExpertNorm):  # every expert gets filters of its own
                layer.starts = tuple(e * layer.width for e in range(layer.num_experts))
            layer.filters, layer.bias, layer.norm = _frozen(filters), _frozen(bias), None
        elif isinstance(layer, PlainConv2d) and isinstance(layer.norm, nn.BatchNorm2d):
            filters, bias = _folded(layer)
            layer.weight, layer.bias, layer.norm = _frozen(filters), _frozen(bias), None
    return twin


def _routers(model: RoutedNetwork) -> list[nn.Module]:
    return [router for router in (model.router, *(layer.router for layer in model.moe_layers())) if router is not None]


@torch.no_grad()
def refresh(twin: RoutedNetwork, model: RoutedNetwork) -> None:
    """Bring `twin`, which `fused` made of this `model`, up to what the model has become, in the memory that it has."""
    layers = dict(twin.named_modules())
    old: list[Tensor] = []
    new: list[Tensor] = []
    for name, layer in model.named_modules():
        if name in layers:  # the others are folded norms
            old += _tensors(layers[name])
            new += _folded(layer) if _has_norm(layer) else _tensors(layer)
    pairs = [(own, value) for own, value in zip(old, new, strict=True) if own is not value]  # routers' parameters are shared
    torch._foreach_copy_([own for own, _ in pairs], [value for _, value in pairs])


def _has_norm(layer: nn.Module) -> bool:
    return isinstance(layer, PlainConv2d | MoEConv2d) and layer.norm is not None


def _tensors(layer: nn.Module) -> list[Tensor]:
    """The layer's own parameters and buffers, not its parts': of a fused convolution its filters and bias."""
    return [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]


def _folded(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Filters and bias of a convolution that does what it and its norm do in eval mode. An MoE layer's experts each have a
    bias; they have filters of their own if their norms are, else they share the bank."""
    assert isinstance(layer, PlainConv2d | MoEConv2d)
    assert isinstance(layer.norm, nn.BatchNorm2d | ExpertNorm)
    scale, shift = _affine(layer.norm)
    if isinstance(layer, PlainConv2d):
        return layer.weight * scale[:, None, None, None], shift
    if isinstance(layer.norm, ExpertNorm):
        parts = [layer.bank.of_expert(e) * scale[e][:, None, None, None] for e in range(layer.num_experts)]
        return torch.cat(parts), shift
    channel = torch.arange(len(layer.filters), device=scale.device) % layer.width
    return layer.filters * scale[channel][:, None, None, None], shift.repeat(layer.num_experts, 1)


def _affine(norm: nn.BatchNorm2d | ExpertNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm in eval mode, of its weights' shape."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return (scale * norm.mask(), shift * norm.mask()) if isinstance(norm, MaskedNorm) else (scale, shift)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)

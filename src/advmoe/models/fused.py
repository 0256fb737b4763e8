"""A faster copy of a network for inference: batch norms that directly follow a convolution are folded into its filters."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from advmoe.moe import ExpertNorm, MaskedNorm, MoEConv2d, PlainConv2d, RoutedNetwork, Router
from advmoe.moe.convert.prepare import bake, copied
from advmoe.moe.replace import replace_modules

Network = TypeVar("Network", bound=RoutedNetwork)


@torch.no_grad()
def fused(model: Network) -> Network:
    """A copy in eval mode that computes the same logits and routes, up to rounding, in less time.

    The copy shares its router parameters with the model, so the routers can be trained through it. All other
    tensors are copied, and their parameters are frozen.
    """
    router_parameters = {id(parameter): parameter for parameter in model.router_parameters()}
    fused_copy = copied(model, dict(router_parameters)).eval()
    routers = (fused_copy.router, *(layer.router for layer in fused_copy.moe_layers()))
    router_modules = {module for router in routers if router is not None for module in router.modules()}
    for module in fused_copy.modules():
        if module not in router_modules:
            bake(module)  # pruned or reparametrised weights
    for parameter in (*fused_copy.weight_parameters(), *fused_copy.mask_parameters()):
        parameter.requires_grad_(False)
    for layer in fused_copy.modules():
        if isinstance(layer, MoEConv2d) and layer.norm is not None:
            filters, bias = _folded(layer)
            if isinstance(layer.norm, ExpertNorm):  # each expert has a norm, so each gets separate filters
                layer.starts = tuple(e * layer.width for e in range(layer.num_experts))
            layer.filters, layer.bias, layer.norm = _frozen(filters), _frozen(bias), None
        elif isinstance(layer, PlainConv2d) and isinstance(layer.norm, nn.BatchNorm2d):
            filters, bias = _folded(layer)
            layer.weight, layer.bias, layer.norm = _frozen(filters), _frozen(bias), None
    return fused_copy


@torch.no_grad()
def fold_routers(fused_copy: RoutedNetwork) -> None:
    """Fold the standardisation of every router into its linear layer, in place. The routers can no longer be trained."""
    replace_modules(fused_copy, lambda module: module.folded() if isinstance(module, Router) else module)


@torch.no_grad()
def refresh(fused_copy: RoutedNetwork, model: RoutedNetwork) -> None:
    """Copy the current state of `model` into `fused_copy`, which `fused(model)` returned earlier, in place."""
    layers = dict(fused_copy.named_modules())
    old: list[Tensor] = []
    new: list[Tensor] = []
    for name, layer in model.named_modules():
        if name in layers:  # folded norms are not in `layers`
            old += _tensors(layers[name])
            has_norm = isinstance(layer, PlainConv2d | MoEConv2d) and layer.norm is not None
            new += _folded(layer) if has_norm else _tensors(layer)
    pairs = [(target, source) for target, source in zip(old, new, strict=True) if target is not source]  # routers are shared
    torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


def _tensors(layer: nn.Module) -> list[Tensor]:
    """The parameters and buffers of this layer without its submodules. For a fused convolution: its filters and bias."""
    return [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]


def _folded(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Filters and bias of one convolution that equals `layer` followed by its norm in eval mode.

    In an MoE layer each expert has a bias [N, K]. With one norm for each expert the experts have separate filters
    [N * K, C, k, k]; with a shared norm they share the bank [M, C, k, k].
    """
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
    """Scale and shift that a norm applies in eval mode, each in the shape of its weights."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return (scale * norm.mask(), shift * norm.mask()) if isinstance(norm, MaskedNorm) else (scale, shift)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)

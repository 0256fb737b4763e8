"""A faster copy of a network for inference: batch norms that directly follow a convolution are folded into its filters."""

from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from advmoe.moe import DenseConv2d, ExpertNorm, MaskedNorm, MoEConv2d, PlainConv2d, RoutedNetwork, Router
from advmoe.moe.copies import bake, copied, has_computed_weights
from advmoe.moe.norm import BatchNorm2d
from advmoe.moe.replace import replace_modules

Network = TypeVar("Network", bound=RoutedNetwork)


@torch.no_grad()
def fused(model: Network) -> Network:
    """A copy in eval mode that computes the same logits and routes, up to rounding, in less time. Attacks run on it.

    It supports every gate and dispatch, and gives gradients to the images. It shares its router parameters with the model, and the
    buffers of a network router, so the routers can be trained through it. All other parameters are copies, and frozen. After a
    change of the model, call `refresh`. A norm or layer of a user's class, or a norm with hooks, is copied as it is.
    """
    shared = [*model.router_parameters(), *(() if model.router is None else model.router.buffers())]
    fused_copy = copied(model, {id(tensor): tensor for tensor in shared}).eval()
    router_modules = {module for router in fused_copy.routers() for module in router.modules()}
    for module in fused_copy.modules():
        if module not in router_modules:
            bake(module)  # pruned or reparametrised weights
    for layer in fused_copy.modules():
        if _has_batch_norm(layer):
            filters, bias = (nn.Parameter(tensor) for tensor in _folded(layer))
            if isinstance(layer, PlainConv2d):
                layer.weight = filters
            else:
                layer.filters = filters
                if isinstance(layer.norm, ExpertNorm):  # each expert has a norm, so each gets separate filters
                    layer.starts = tuple(e * layer.width for e in range(layer.num_experts))
            layer.bias, layer.norm = bias, None
    for parameter in (*fused_copy.weight_parameters(), *fused_copy.mask_parameters()):
        parameter.requires_grad_(False)
    return fused_copy


@torch.no_grad()
def fold_routers(fused_copy: RoutedNetwork) -> None:
    """Fold the standardisation of every router into its linear layer, in place. The routers can no longer be trained.

    A router of a user's class does not change.
    """
    replace_modules(fused_copy, lambda module: module.folded() if type(module) is Router else module)


@torch.no_grad()
def refresh(fused_copy: RoutedNetwork, model: RoutedNetwork) -> None:
    """Copy the current state of `model` into `fused_copy`, which `fused(model)` returned earlier, in place."""
    layers, pairs = dict(fused_copy.named_modules()), list[tuple[Tensor, Tensor]]()
    current = fused(model) if any(map(has_computed_weights, model.modules())) else model
    for name, layer in current.named_modules():
        if name in layers:  # folded norms are not in `layers`
            sources = _folded(layer) if _has_batch_norm(layer) else _tensors(layer)
            pairs += zip(_tensors(layers[name]), sources, strict=True)
    pairs = [(target, source) for target, source in pairs if target is not source]  # routers are shared
    torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


def _tensors(layer: nn.Module) -> list[Tensor]:
    """The parameters and buffers of this layer without its submodules. For a fused convolution: its filters and bias."""
    return [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]


def _has_batch_norm(layer: nn.Module) -> TypeGuard[PlainConv2d | MoEConv2d]:
    """Whether a layer has a norm that can be folded in. Subclasses of a user may compute something else, so types are exact."""
    norm: Any = getattr(layer, "norm", None)
    return (
        type(layer) in (PlainConv2d, DenseConv2d, MoEConv2d)
        and type(norm) in (nn.BatchNorm2d, BatchNorm2d, MaskedNorm, ExpertNorm)
        and norm.weight is not None
        and norm.running_mean is not None
        and not (norm._forward_hooks or norm._forward_pre_hooks)
    )


def _folded(layer: PlainConv2d | MoEConv2d) -> tuple[Tensor, Tensor]:
    """Filters and bias of one convolution that equals `layer` followed by its norm in eval mode.

    In an MoE layer each expert has a bias [N, K]. With one norm for each expert the experts have separate filters
    [N * K, C, k, k]; with a shared norm they share the bank [M, C, k, k].
    """
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

"""Deep copies of networks, and plain weights in place of computed ones (weight_norm, spectral_norm, pruning, parametrizations)."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from advmoe.errors import UserError

Network = TypeVar("Network", bound=nn.Module)
COMPUTING_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)


def copied(network: Network, memo: dict[int, Any] | None = None) -> Network:
    """A deep copy. `memo`, as in copy.deepcopy, names objects not to copy. Raises UserError if the network cannot be copied."""
    computed = {  # weight_norm and similar functions keep computed tensors, which deepcopy does not support
        id(value): value.detach().clone()
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(network, computed | (memo or {}))
    except Exception as error:  # the modules of a user can raise any exception
        raise UserError(f"{type(network).__name__}: cannot be copied: {error}") from None


def with_plain_weights(network: Network) -> Network:
    """A copy in eval mode, in which weights that are computed in each forward pass are plain weights with their value in it."""
    plain = copied(network).eval()  # in train mode, spectral_norm changes its weight in each pass
    for module in list(plain.modules()):
        bake(module)
    return plain


def has_computed_weights(module: nn.Module) -> bool:
    """Whether a weight of the module itself is computed in each forward pass, so that `bake` would change it."""
    hooks = module._forward_pre_hooks.values()
    return parametrize.is_parametrized(module) or any(isinstance(hook, COMPUTING_HOOKS) for hook in hooks)


def bake(module: nn.Module) -> None:
    """Replace a weight that is computed in each forward pass by a plain one with its value in the module's mode."""
    with torch.no_grad():
        if parametrize.is_parametrized(module):
            _bake_parametrizations(module)
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)


def _bake_parametrizations(module: nn.Module) -> None:
    # not remove_parametrizations, which changes the class that a copy shares with the original
    assert isinstance(module.parametrizations, nn.ModuleDict)
    values = {name: getattr(module, name) for name in module.parametrizations}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value.detach().clone()))

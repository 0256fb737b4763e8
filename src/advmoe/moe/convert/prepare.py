"""Prepare a network for tracing: a copy that has only layers and parameters.

Tracing would drop computed weights, hooks and replaced methods. Computed weights become plain weights; the others raise an error.
"""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from advmoe.errors import UserError

Network = TypeVar("Network", bound=nn.Module)
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)  # their attribute `module` is the network
HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
REMEDY = "would be lost: remove it, or move what it does into forward()"


def prepared(model: nn.Module) -> nn.Module:
    """A copy of `model` with plain weights, also where weight_norm, spectral_norm, pruning or a parametrization computes them.

    `model` itself does not change. Raises UserError, with the name of the module, if a module has hooks, replaced methods, or
    parameters that are not initialised.
    """
    network = unwrapped(model)
    _check_initialised(network)
    network = with_plain_weights(network)
    for name, module in network.named_modules():
        _check(module, name or type(network).__name__)
    return network


def with_plain_weights(network: Network) -> Network:
    """A copy in eval mode, in which weights that are computed in each forward pass are plain weights with their value in it."""
    copy = copied(network).eval()  # in train mode, spectral_norm changes its weight in each pass
    for module in list(copy.modules()):
        bake(module)
    return copy


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside torch.compile, DataParallel and the like."""
    while True:
        wrapped = model.module if isinstance(model, WRAPPERS) else getattr(model, "_orig_mod", model)
        if wrapped is model:
            return model
        assert isinstance(wrapped, nn.Module)
        model = wrapped


def _check_initialised(network: nn.Module) -> None:
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise UserError(f"{name}: has no shape yet: run the network once on an image before convert()")


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


def _check(module: nn.Module, name: str) -> None:
    """Raises UserError if the module has hooks or replaced methods, or is compiled to TorchScript."""
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError(f"{name}: is compiled to TorchScript; convert() takes the nn.Module that it was made from")
    for attribute, kind in HOOKS.items():
        for hook in getattr(module, attribute).values():
            raise UserError(f"{name}: its {kind} ({_called(hook)}) {REMEDY}")
    for attribute, value in vars(module).items():
        if callable(value) and not isinstance(value, nn.Module) and callable(getattr(type(module), attribute, None)):
            raise UserError(f"{name}: its replaced method {attribute}() {REMEDY}")


def _called(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)

"""Prepare a network for tracing: a copy that has only layers and parameters.

Tracing would drop computed weights, hooks and replaced methods. Computed weights become plain weights; the others raise an error.
"""

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from advmoe.errors import UserError
from advmoe.moe.copies import with_plain_weights

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

"""Wrappers of a network under attack: a faster copy that supplies gradients, and one that does not change its input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from advmoe.models.fused import fold_routers, fused
from advmoe.moe import HARD, Gate, RoutedNetwork, Routing


class LowPrecision(nn.Module):
    """The same network under bfloat16 autocast. Its logits are float32."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            logits: Tensor = self.model(x)
        return logits.float()

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Sequence[Routing]]:
        """The network's `forward_routed`."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            logits, routings = self.model.forward_routed(x, gate)
        return logits.float(), routings


class CopiedInput(nn.Module):
    """The same network on a copy of its input, for a network that changes its input in place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.clone())
        return logits


class CopiedRoutedInput(CopiedInput):
    """`CopiedInput` for a network that routes."""

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Sequence[Routing]]:
        """The network's `forward_routed`."""
        model: Any = self.model
        logits, routings = model.forward_routed(x.clone(), gate)
        return logits, routings


def copying(model: nn.Module, x: Tensor) -> nn.Module:
    """`model`, wrapped so that it runs on a copy of its input if it changes x [B, C, H, W] in place, with or without gradients."""
    if not _changes_input(model, x):
        return model
    return CopiedRoutedInput(model) if hasattr(model, "forward_routed") else CopiedInput(model)


def _changes_input(model: nn.Module, x: Tensor) -> bool:
    for needs_gradient in (False, True):
        leaf = x.clone().requires_grad_(needs_gradient)
        try:
            with torch.set_grad_enabled(needs_gradient):
                model(leaf)
        except (RuntimeError, ValueError) as error:  # `make_target` reports others
            if "in-place" in str(error):  # "a leaf Variable that requires grad is being used in an in-place operation"
                return True
        if not torch.equal(leaf.detach(), x):
            return True
    return False


def gradient_network(model: nn.Module, *, bf16: bool) -> nn.Module:
    """The network that supplies the gradients of attacks: `model` itself, or a faster copy."""
    search = model
    if isinstance(model, RoutedNetwork) and _is_plain(model):
        search = fused(model)
        fold_routers(search)
    return LowPrecision(search) if bf16 else search


def _is_plain(model: nn.Module) -> bool:
    """Whether all parameters are plain: none is computed in each forward pass by pruning, weight norm or a parametrization."""
    return not any(parametrize.is_parametrized(module) or module._forward_pre_hooks for module in model.modules())

"""Adversarial weight perturbation (AWP, Wu et al. 2020)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from advmoe.moe import ExpertNorm, RoutedNetwork


@contextmanager
def perturbed(model: RoutedNetwork, gamma: float, backward: Callable[[], object], routers: bool = False) -> Iterator[None]:
    """Inside, each weight tensor w is w + gamma * |w| * g / |g|, with g the gradient that `backward` leaves.

    Weight tensors are those of convolutions and linear layers that learn, the routers' only if `routers`; norms and biases stay.
    This is one step of the ascent of the paper, with layer-wise norms. `backward` runs at w; what it does to the model's running
    statistics is undone. Afterwards w is exactly what it was; gradients taken inside stay.
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    backward()
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
    norms = {id(weight) for norm in model.modules() if isinstance(norm, ExpertNorm) for weight in norm.parameters()}
    candidates = [*model.weight_parameters(), *(model.router_parameters() if routers else [])]
    weights = [weight for weight in candidates if weight.ndim > 1 and id(weight) not in norms]
    moved = [weight for weight in weights if weight.requires_grad and weight.grad is not None]
    before = [parameter.detach().clone() for parameter in moved]
    with torch.no_grad():
        for parameter in moved:
            assert parameter.grad is not None
            parameter.add_(step(parameter, parameter.grad, gamma))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(moved, before, strict=True):
                parameter.copy_(value)


def step(parameter: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    """gamma * |w| * g / |g|; 0 where g is 0."""
    scale: Tensor = gamma * parameter.norm() / gradient.norm().clamp(min=1e-12)
    return scale * gradient

"""Adversarial weight perturbation (AWP, Wu et al. 2020)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from advmoe.moe import ExpertNorm, MoEConv2d, RoutedNetwork
from advmoe.training.statistics import kept_statistics


@contextmanager
def perturbed(model: RoutedNetwork, gamma: float, backward: Callable[[], object], routers: bool = False) -> Iterator[None]:
    """Inside the block, each weight tensor w is w + gamma * |w| * grad / |grad|, with the gradient that `backward` computes.

    Weight tensors are the parameters of two or more dimensions that learn, as those of convolutions and linear layers; those of
    routers are among them only if `routers` is true. Norms and biases do not change. This is one step of the paper's ascent, with
    layer-wise norms. `backward` runs at w; its changes of the model's running statistics are undone. After the block, w is exactly
    as before, and the gradients computed inside are kept.
    """
    with kept_statistics(model):
        backward()
    norms = {id(weight) for norm in model.modules() if isinstance(norm, ExpertNorm) for weight in norm.parameters()}
    biases = {id(layer.bias) for layer in model.modules() if isinstance(layer, MoEConv2d)}  # [N, K]
    candidates = [*model.weight_parameters(), *(model.router_parameters() if routers else [])]
    weights = [weight for weight in candidates if weight.ndim > 1 and id(weight) not in norms | biases]
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
    """gamma * |w| * grad / |grad|; 0 where grad is 0."""
    scale: Tensor = gamma * parameter.norm() / gradient.norm().clamp(min=1e-12)
    return scale * gradient

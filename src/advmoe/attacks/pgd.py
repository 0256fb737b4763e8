"""Projected gradient descent in the L-infinity ball (Madry et al. 2018)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from advmoe.attacks.draws import Draws
from advmoe.attacks.objectives import Objective, cross_entropy

Predict = Callable[[Tensor], Tensor]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; what was found before is restored."""
    modes = {module: module.training for module in model.modules()}
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class Pgd:
    """Settings of an attack: `epsilon` and `step_size` in pixels of [0, 1].

    `start`: "uniform" draws from the ball, "normal" adds 0.001 * N(0, 1) (TRADES), "none" starts at the picture.
    """

    epsilon: float
    step_size: float
    num_steps: int
    restarts: int = 1
    start: Literal["uniform", "normal", "none"] = "uniform"


def pgd(predict: Predict, x: Tensor, target: Tensor, settings: Pgd, draws: Draws, objective: Objective = cross_entropy) -> Tensor:
    """Pictures in the ball around `x` [B, C, H, W] that raise `objective(predict(x'), target)`.

    `predict` maps pixels in [0, 1] to logits and should be frozen (`frozen(model)`). With several restarts, each
    picture keeps the end point with the highest objective. Projection happens outside the graph.
    """
    best = _ascend(predict, x, target, settings, draws, objective)
    if settings.restarts == 1:
        return best
    with torch.no_grad():
        value = objective(predict(best), target)
        for _ in range(settings.restarts - 1):
            other = _ascend(predict, x, target, replace(settings, restarts=1), draws, objective)
            other_value = objective(predict(other), target)
            better = other_value > value
            best = torch.where(better[:, None, None, None], other, best)
            value = torch.where(better, other_value, value)
    return best


def project(x_adv: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """Nearest point of the L-infinity ball around x and of [0, 1]."""
    return torch.minimum(torch.maximum(x_adv, x - epsilon), x + epsilon).clamp_(0, 1)


def input_gradient(predict: Predict, x: Tensor, target: Tensor, objective: Objective) -> Tensor:
    """Gradient of the summed objective with respect to the pictures alone."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(predict(leaf), target).sum(), leaf)
    return gradient


@torch.no_grad()
def _ascend(predict: Predict, x: Tensor, target: Tensor, settings: Pgd, draws: Draws, objective: Objective) -> Tensor:
    x_adv = project(_start(x, settings, draws), x, settings.epsilon)
    for _ in range(settings.num_steps):
        direction = input_gradient(predict, x_adv, target, objective).sign_()
        x_adv = project(x_adv + settings.step_size * direction, x, settings.epsilon)
    return x_adv


def _start(x: Tensor, settings: Pgd, draws: Draws) -> Tensor:
    if settings.start == "uniform":
        return x + settings.epsilon * draws.uniform(x)
    if settings.start == "normal":
        return x + 0.001 * draws.normal(x)
    return x

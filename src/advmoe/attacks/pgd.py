"""Projected gradient descent in the L-infinity or the L2 ball (Madry et al. 2018)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from advmoe.attacks.draws import Draws
from advmoe.attacks.geometry import ascent, check_settings, project, uniform_start
from advmoe.attacks.objectives import Objective, cross_entropy, predicted
from advmoe.config.choices import Norm
from advmoe.errors import UserError, nearest
from advmoe.moe.replace import kept_modes

Start = Literal["uniform", "normal", "none"]
Predict = Callable[[Tensor], Tensor]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block, the model is in eval mode and its parameters get no gradients. Afterwards the old state is restored."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with kept_modes(model):
        model.eval()
        for parameter in learned:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learned:
                parameter.requires_grad_(True)


@dataclass(frozen=True)
class Pgd:
    """Settings of an attack: `epsilon` and `step_size` in pixels of [0, 1], as distances in `norm`.

    `start`: "uniform" draws a point from the ball, "normal" adds 0.001 * N(0, 1) to the image (TRADES), "none" starts at the image.
    """

    epsilon: float
    step_size: float
    num_steps: int
    restarts: int = 1
    start: Start = "uniform"
    norm: Norm = "Linf"

    def __post_init__(self) -> None:
        check_settings(self.epsilon, self.norm, self.num_steps, self.restarts)
        if not self.step_size >= 0:
            raise UserError(f"step_size must be at least 0, not {self.step_size:g}")
        if self.start not in get_args(Start):
            raise UserError(f"unknown start '{self.start}': {nearest(self.start, list(get_args(Start)))}")


def evaluation_pgd(epsilon: float, num_steps: int, norm: Norm = "Linf") -> Pgd:
    """The PGD of evaluations and of validation: step size epsilon / 4, which is 2/255 for 8/255, and a random start."""
    return Pgd(epsilon, epsilon / 4, num_steps, norm=norm)


def pgd(predict: Predict, x: Tensor, target: Tensor, settings: Pgd, draws: Draws, objective: Objective = cross_entropy) -> Tensor:
    """Images [B, C, H, W] in the ball around `x` that maximise `objective(predict(x'), target)`.

    `predict` maps pixels in [0, 1] to logits and should be frozen (`frozen(model)`). With several restarts, each image keeps the
    last point with the highest objective; if `target` is labels [B] int64, a misclassified one if there is any. The projection is
    not part of the autograd graph.
    """
    best = _ascend(predict, _start(x, settings, draws), x, target, settings, objective)
    if settings.restarts == 1:
        return best
    with torch.no_grad():
        fooled, value = _fooled_and_value(predict, best, target, objective)
        for _ in range(settings.restarts - 1):
            other = _ascend(predict, _start(x, settings, draws), x, target, settings, objective)
            other_fooled, other_value = _fooled_and_value(predict, other, target, objective)
            better = torch.where(fooled == other_fooled, other_value > value, other_fooled)
            best = torch.where(better[:, None, None, None], other, best)
            fooled, value = fooled | other_fooled, torch.where(better, other_value, value)
    return best


def _fooled_and_value(predict: Predict, x_adv: Tensor, target: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Which images are misclassified, [B] bool, and the objective [B]. Without labels [B] as the target, none counts as such."""
    logits = predict(x_adv)
    value = objective(logits, target)
    has_labels = target.ndim == 1 and not target.is_floating_point()
    return predicted(logits) != target if has_labels else torch.zeros_like(value, dtype=torch.bool), value


def forward_backward(predict: Predict, x: Tensor, target: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, classes], objective [B], and the gradient of its sum with respect to only the images."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        logits = predict(leaf)
        values = objective(logits, target)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return logits.detach(), values.detach(), gradient


def input_gradient(predict: Predict, x: Tensor, target: Tensor, objective: Objective) -> Tensor:
    """The gradient [B, C, H, W] of the summed objective with respect to only the images."""
    return forward_backward(predict, x, target, objective)[2]


def pgd_points(predict: Predict, x: Tensor, y: Tensor, settings: Pgd, draws: Draws, marks: Sequence[int]) -> list[Tensor]:
    """The points of one ascent on cross-entropy after each number of steps in `marks`, which ascend; y [B] int64.

    With the same draws, the point after k steps equals the result of `pgd` with k steps and one restart.
    """
    x_adv, points = _start(x, settings, draws), []
    for before, after in pairwise((0, *marks)):
        x_adv = _ascend(predict, x_adv, x, y, replace(settings, num_steps=after - before), cross_entropy)
        points.append(x_adv)
    return points


@torch.no_grad()
def _ascend(predict: Predict, x_adv: Tensor, x: Tensor, target: Tensor, settings: Pgd, objective: Objective) -> Tensor:
    """The point after `settings.num_steps` steps from `x_adv` in the ball around `x`."""
    for _ in range(settings.num_steps):
        direction = ascent(input_gradient(predict, x_adv, target, objective), settings.norm)
        x_adv = project(x_adv + settings.step_size * direction, x, settings.epsilon, settings.norm)
    return x_adv


def _start(x: Tensor, settings: Pgd, draws: Draws) -> Tensor:
    start = x
    if settings.start == "uniform":
        start = uniform_start(x, settings.epsilon, settings.norm, draws)
    elif settings.start == "normal":
        start = x + 0.001 * draws.normal(x)
    return project(start, x, settings.epsilon, settings.norm)

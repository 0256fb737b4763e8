"""Attacks that follow the gradient of a differentiable surrogate. The true network decides whether a point fools it.

Hard routing hides gradients: the route is an argmax. A surrogate has them: another gate, a forced route, a loss on the routers'
margins, or another network.

Shapes: B images, L MoE layers, N experts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from advmoe.attacks.draws import Draws
from advmoe.attacks.geometry import project
from advmoe.attacks.objectives import Objective, cross_entropy, predicted
from advmoe.attacks.pgd import Predict
from advmoe.config.choices import BATCH_SIZE
from advmoe.moe import HARD, ForcedGate, Gate, Routing

UNDECIDED = 1e-5  # router margin below which rounding may choose either expert; see `undecided`


class Routed(Protocol):
    """The interface of a network whose routing can be attacked: logits, and logits with the routes under any Gate.

    `forward_routed` returns one Routing for each layer that routes, in order. It supports `hard`, `straight_through`, `soft` and
    `forced` gates (in a forced route, -1 lets the layer's router choose) and stores no state.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [B, classes] through the hard gate."""
        ...

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Sequence[Routing]]:
        """Logits [B, classes], and the Routing of each layer that routes."""
        ...


@dataclass(frozen=True)
class Search:
    """Settings of one ascent. The step size starts at `epsilon` / 2 and falls to a fiftieth of that along a cosine.

    `batch_size`: ascents of the same images run together while they have at most this many rows.
    """

    epsilon: float
    num_steps: int
    batch_size: int = BATCH_SIZE

    def step(self, number: int) -> float:
        """Step size of step `number`, counted from 0."""
        return self.epsilon * (0.01 + 0.49 * 0.5 * (1 + math.cos(math.pi * number / self.num_steps)))


Surrogate = Callable[[Tensor, Tensor, Tensor], Tensor]  # pixels, labels, rows of the batch [B] -> the value to maximise [B]


@torch.no_grad()
def surrogate_pgd(predict: Predict, surrogate: Surrogate, x: Tensor, y: Tensor, search: Search, draws: Draws) -> Tensor:
    """Maximise `surrogate` from a random point of the ball. An image stops at its first point that fools `predict`.

    x [B, C, H, W], y [B] -> x' [B, C, H, W] in the L-infinity ball: the first point that fools, or the last point.
    """
    x_adv = project(x + search.epsilon * draws.uniform(x), x, search.epsilon)
    rows = _correct_rows(predict, x_adv, y, torch.arange(len(x), device=x.device))
    for number in range(search.num_steps):
        if len(rows) == 0:
            break
        direction = ascent_direction(surrogate, x_adv[rows], y[rows], rows)
        x_adv[rows] = project(x_adv[rows] + search.step(number) * direction, x[rows], search.epsilon)
        rows = _correct_rows(predict, x_adv, y, rows)
    return x_adv


def ascent_direction(surrogate: Surrogate, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """Sign of the gradient of the summed surrogate with respect to the images; 0 where that is NaN."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(surrogate(leaf, y, rows).sum(), leaf)
    return gradient.nan_to_num(0).sign()


def _correct_rows(predict: Predict, x_adv: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """Those of the `rows` that `predict` classifies correctly."""
    return rows[predicted(predict(x_adv[rows])) == y[rows]] if len(rows) else rows


def through_gate(model: Routed, gate: Gate, objective: Objective = cross_entropy) -> Surrogate:
    """An objective of the network under another gate (straight-through or soft, at any temperature)."""

    def value(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return objective(model.forward_routed(x, gate)[0], y)

    return value


def through_route(model: Routed, route: Tensor, objective: Objective = cross_entropy) -> Surrogate:
    """An objective of the network with its route fixed to `route` [B, L]: only the experts are attacked."""

    def value(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return objective(model.forward_routed(x, ForcedGate(route[rows]))[0], y)

    return value


def with_routing_margin(model: Routed, route: Tensor, weight: float) -> Surrogate:
    """CE + weight * mean margin of `route` [B, L] over the layers with more than one expert.

    A positive weight keeps images on the route; a negative one moves them away from it.
    """

    def value(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        logits, routings = model.forward_routed(x, HARD)
        margin = margins(routings, route[rows])
        choice = torch.isfinite(margin)
        mean = torch.where(choice, margin, 0).sum(dim=1) / choice.sum(dim=1).clamp(min=1)
        return cross_entropy(logits, y) + weight * mean

    return value


def margins(routings: Sequence[Routing], route: Tensor) -> Tensor:
    """Each router's margin in favour of `route` [B, L]: the logit of the route's expert minus the largest other one.

    [B, L] float32. The margin is +inf for layers without a forced expert (-1) and for layers of one expert.
    """
    return torch.stack([_margin(routing.logits, route[:, layer]) for layer, routing in enumerate(routings)], dim=1)


def undecided(routings: Sequence[Routing]) -> Tensor:
    """Which images have a router whose margin is so small that rounding may choose either expert: [B] bool.

    That is below `UNDECIDED`, relative to the router's largest absolute logit if that is above 1. A NaN is not small. `routings` is
    not empty.
    """
    gaps = margins(routings, route_of(routings))
    size = torch.stack([routing.logits.abs().amax(dim=1) for routing in routings], dim=1).clamp(min=1)
    return (gaps.abs() < UNDECIDED * size).any(dim=1)


def _margin(logits: Tensor, expert: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return torch.full_like(logits[:, 0], torch.inf)
    index = expert.clamp(min=0)[:, None]
    chosen = logits.gather(1, index)[:, 0]
    other = logits.scatter(1, index, -torch.inf).amax(dim=1)
    return torch.where(expert < 0, torch.inf, chosen - other)


def route_of(routings: Sequence[Routing]) -> Tensor:
    """The experts of each layer, [B, L] int64."""
    return torch.stack([routing.experts for routing in routings], dim=1)

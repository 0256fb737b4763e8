"""Attacks through a differentiable stand-in, each point checked on the true network.

Hard routing hides gradients: the route is an argmax. A surrogate (another gate, a forced route, a loss that pushes the
routers, another network) shows them; whether a point fools is always decided by the true network.

Shapes: B images, L MoE layers, N experts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.attacks.draws import Draws
from advmoe.attacks.geometry import project
from advmoe.attacks.objectives import Objective, cross_entropy
from advmoe.attacks.pgd import Predict
from advmoe.moe import HARD, ForcedGate, Gate, Routing


class Routed(Protocol):
    """What a network must offer to be attacked on its routing: logits, and logits with the routes under any Gate.

    `forward_routed` returns one Routing for each layer that routes, in order; it honours `hard`, `straight_through`,
    `soft` and `forced` gates (`forced` with -1 leaving a layer to its router) and leaves no state behind.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [B, classes] through the hard gate."""
        ...

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Sequence[Routing]]:
        """Logits [B, classes] and each routing layer's decision."""
        ...


@dataclass(frozen=True)
class Search:
    """Budget of one ascent: steps start at `epsilon` / 2 and shrink to a fiftieth of that (cosine)."""

    epsilon: float
    num_steps: int

    def step(self, number: int) -> float:
        """Step size of step `number`, counted from 0."""
        return self.epsilon * (0.01 + 0.49 * 0.5 * (1 + math.cos(math.pi * number / self.num_steps)))


Surrogate = Callable[[Tensor, Tensor, Tensor], Tensor]  # pixels, labels, rows of the batch [B] -> what to raise, [B]


@torch.no_grad()
def surrogate_pgd(
    predict: Predict, surrogate: Surrogate, x: Tensor, y: Tensor, search: Search, draws: Draws, start: Tensor | None = None
) -> Tensor:
    """Raise `surrogate` from a random start (or `start`); an image stops at its first point that fools `predict`.

    x [B, C, H, W], y [B] -> x' [B, C, H, W] in the L-infinity ball: the fooling point, else the last one.
    """
    noise = x + search.epsilon * draws.uniform(x)
    x_adv = project(noise if start is None else start, x, search.epsilon)
    rows = _standing(predict, x_adv, y, torch.arange(len(x), device=x.device))
    for number in range(search.num_steps):
        if len(rows) == 0:
            break
        direction = ascent_direction(surrogate, x_adv[rows], y[rows], rows)
        x_adv[rows] = project(x_adv[rows] + search.step(number) * direction, x[rows], search.epsilon)
        rows = _standing(predict, x_adv, y, rows)
    return x_adv


def ascent_direction(surrogate: Surrogate, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """Sign of the gradient of the summed surrogate with respect to the images; 0 where that is NaN."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(surrogate(leaf, y, rows).sum(), leaf)
    return gradient.nan_to_num(0).sign()


def _standing(predict: Predict, x_adv: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    return rows[predict(x_adv[rows]).argmax(dim=1) == y[rows]] if len(rows) else rows


def through_gate(model: Routed, gate: Gate, objective: Objective = cross_entropy) -> Surrogate:
    """An objective of the network under another gate (straight-through or soft, at any temperature)."""

    def value(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return objective(model.forward_routed(x, gate)[0], y)

    return value


def through_network(predict: Predict) -> Surrogate:
    """Cross-entropy of another network: transfer."""

    def objective(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(predict(x).float(), y, reduction="none")

    return objective


def through_route(model: Routed, route: Tensor, objective: Objective = cross_entropy) -> Surrogate:
    """An objective of the network held on `route` [B, L]: attacks the experts as if the routers were fixed."""

    def value(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return objective(model.forward_routed(x, ForcedGate(route[rows]))[0], y)

    return value


def with_routing_margin(model: Routed, route: Tensor, weight: float) -> Surrogate:
    """CE + weight * mean margin of `route` [B, L] over the layers with a choice: weights above 0 keep it, below 0 leave it."""

    def objective(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        logits, routings = model.forward_routed(x, HARD)
        margin = margins(routings, route[rows])
        choice = torch.isfinite(margin)
        mean = torch.where(choice, margin, 0).sum(dim=1) / choice.sum(dim=1).clamp(min=1)
        return F.cross_entropy(logits.float(), y, reduction="none") + weight * mean

    return objective


def margins(routings: Sequence[Routing], route: Tensor) -> Tensor:
    """How far each layer's router is in favour of `route`: its logit minus the best other one, [B, L] float32.

    Layers left free (-1) and layers of one expert give +inf.
    """
    return torch.stack([_margin(routing.logits, route[:, layer]) for layer, routing in enumerate(routings)], dim=1)


def _margin(logits: Tensor, expert: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return torch.full_like(logits[:, 0], torch.inf)
    index = expert.clamp(min=0)[:, None]
    own = logits.gather(1, index)[:, 0]
    other = logits.scatter(1, index, -torch.inf).amax(dim=1)
    return torch.where(expert < 0, torch.inf, own - other)


def route_of(routings: Sequence[Routing]) -> Tensor:
    """The experts of each layer, [B, L] int64."""
    return torch.stack([routing.experts for routing in routings], dim=1)

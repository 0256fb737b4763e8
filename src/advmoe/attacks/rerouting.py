"""The route-aware attack: move an image to another pathway, then attack it there.

A change replaces one layer's expert in an image's pathway. The changes of each image are ranked in two ways: by the perturbation
that they need (first-order estimate: the router's margin divided by the L1 norm of its gradient), and by the class margin after
the change. The first changes of both rankings are tried in turn, and the most promising ones are combined by beam search. With L
layers and N experts this takes at most L * (N - 1) gradients and forward passes, 2 * `singles` short ascents, and `budget`
ascents; it does not try all N^L pathways.

Shapes: B images, L MoE layers, N experts, R candidate changes an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advmoe.attacks.draws import Draws, ImageDraws
from advmoe.attacks.geometry import project
from advmoe.attacks.objectives import margin, predicted
from advmoe.attacks.pgd import Pgd, pgd
from advmoe.attacks.surrogate import Routed, Search, margins, route_of
from advmoe.moe import HARD, ForcedGate, Routing

HOLD = 0.05  # the hinge loss raises a router's margin up to this value
WEIGHT = 10.0  # of the routers' hinge loss relative to the class margin
PROBE_STEPS = 3  # steps of the attack that estimates the class margin after a change


@dataclass(frozen=True)
class Beam:
    """Settings of the search: `singles` changes are tried alone. Then `depth` - 1 rounds extend the best `width` pathways, each by
    `branches` further changes."""

    singles: int = 4
    width: int = 2
    branches: int = 2
    depth: int = 3

    @property
    def budget(self) -> int:
        """The largest number of ascents per image. Each has two more forward passes than steps."""
        return self.singles + (self.depth - 1) * self.width * self.branches


@torch.no_grad()
def reroute(model: Routed, x: Tensor, y: Tensor, search: Search, beam: Beam, draws: Draws) -> Tensor:
    """x' [B, C, H, W] in the L-infinity ball: a point that fools the network, usually on another pathway, or the image
    itself if the search finds none. x [B, C, H, W], y [B] int64. `model` should be frozen.
    """
    task = _Task(model, x, y, search, x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device))
    start = project(x + search.epsilon * draws.uniform(x), x, search.epsilon)
    cheap = cheapest_changes(model, x)
    changes = in_turn(cheap, weakest_changes(model, x, y, cheap, search.epsilon, 2 * beam.singles))
    free = _no_forced_layer(model, x)
    singles = range(min(beam.singles, changes.shape[1]))
    states = _attempts(task, [(_with_change(free, changes, number), start) for number in singles])
    for _ in range(1, beam.depth if states else 1):
        further = [
            (_with_change(state.route, changes, branch), state.x_adv)
            for state in _best(states, beam.width)
            for branch in range(min(beam.branches, changes.shape[1]))
        ]
        states = _attempts(task, further)
    return task.x_adv


def cheapest_changes(model: Routed, x: Tensor) -> Tensor:
    """The changes of each image: (layer, expert) pairs [B, R, 2] int64, cheapest first. R is the sum of N - 1 over the layers."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        _, routings = model.forward_routed(leaf, HARD)
        costs, pairs = [], []
        for layer, routing in enumerate(routings):
            num_experts = routing.logits.shape[1]
            for offset in range(1, num_experts):
                other = (routing.experts + offset) % num_experts
                costs.append(_cost(leaf, routing, other))
                pairs.append(torch.stack([torch.full_like(other, layer), other], dim=1))
    if not costs:
        return torch.zeros(len(x), 0, 2, dtype=torch.long, device=x.device)
    order = torch.stack(costs, dim=1).argsort(dim=1, stable=True)
    return torch.stack(pairs, dim=1).gather(1, order[:, :, None].expand(-1, -1, 2))


def weakest_changes(model: Routed, x: Tensor, y: Tensor, changes: Tensor, epsilon: float, probes: int) -> Tensor:
    """`changes` [B, R, 2] sorted by the class margin after the change, highest first.

    The margin is computed with the change forced: at the image for all changes, and for the best `probes` of them also after a
    few steps of an attack.
    """
    if not changes.shape[1]:
        return changes
    free = _no_forced_layer(model, x)
    routes = [free.scatter(1, change[:, :1], change[:, 1:]) for change in changes.unbind(dim=1)]
    at_image = torch.stack([_forced_margin(model, x, y, route) for route in routes], dim=1)
    changes = _reordered(changes, at_image)
    values = at_image.sort(dim=1, descending=True, stable=True).values
    for number in range(min(probes, changes.shape[1])):
        route = free.scatter(1, changes[:, number, :1], changes[:, number, 1:])
        values[:, number] = torch.maximum(values[:, number], _margin_behind(model, x, y, route, epsilon))
    values[:, probes:] -= 1e6  # changes without a probe come last
    return _reordered(changes, values)


def in_turn(first: Tensor, second: Tensor) -> Tensor:
    """Two orders of the same pairs [B, R, 2] merged in turn: the best pair of the first, the best other pair of the second, ..."""
    same = (first[:, :, None] == second[:, None]).all(dim=3)  # [B, R, R]
    rank = torch.arange(first.shape[1], device=first.device)
    rank_in_second = (same * rank).sum(dim=2)
    return first.gather(
        1, torch.minimum(2 * rank, 2 * rank_in_second + 1).argsort(dim=1, stable=True)[:, :, None].expand(-1, -1, 2)
    )


def _reordered(changes: Tensor, values: Tensor) -> Tensor:
    order = values.argsort(dim=1, descending=True, stable=True)
    return changes.gather(1, order[:, :, None].expand(-1, -1, 2))


def _forced_margin(model: Routed, x: Tensor, y: Tensor, route: Tensor) -> Tensor:
    return margin(model.forward_routed(x, ForcedGate(route))[0], y).nan_to_num(nan=-1e30)


def _margin_behind(model: Routed, x: Tensor, y: Tensor, route: Tensor, epsilon: float) -> Tensor:
    """The class margin [B] after a few steps of an attack on the network with its route fixed to `route` [B, L]."""
    settings = Pgd(epsilon, epsilon / 2, PROBE_STEPS, start="none")
    z = pgd(lambda z: model.forward_routed(z, ForcedGate(route))[0], x, y, settings, ImageDraws(0, []), margin)
    return _forced_margin(model, z, y, route)


def _cost(leaf: Tensor, routing: Routing, other: Tensor) -> Tensor:
    """First-order estimate [B] of the L-infinity distance to a point where the expert `other` [B] is chosen."""
    chosen, rival = (routing.logits.gather(1, experts[:, None])[:, 0] for experts in (routing.experts, other))
    gap = chosen - rival
    slope = torch.zeros_like(gap)
    if gap.requires_grad:  # if not, the router does not depend on the image
        (gradient,) = torch.autograd.grad(gap.sum(), leaf, retain_graph=True, materialize_grads=True)
        slope = gradient.flatten(1).abs().sum(dim=1)
    return torch.nan_to_num(gap.detach() / slope.detach().clamp(min=1e-12), nan=1e30, posinf=1e30)


@dataclass
class _Task:
    """The images x [B, C, H, W] with labels y [B] of one search, and its results, which all attempts share.

    `x_adv` are the points that fool the network so far, else the clean images. `fooled` [B] bool says which images are fooled.
    """

    model: Routed
    x: Tensor
    y: Tensor
    search: Search
    x_adv: Tensor
    fooled: Tensor


@dataclass
class _State:
    """The attempt on one pathway: its route [B, L], its last point, and the highest loss [B] while images took the route."""

    route: Tensor
    x_adv: Tensor
    loss: Tensor


def _attempts(task: _Task, routes_and_starts: Sequence[tuple[Tensor, Tensor]]) -> list[_State]:
    """One attempt for each pair of a route [B, L] and start points [B, C, H, W], as many at once as `search.batch_size` allows."""
    at_once, states = max(1, task.search.batch_size // max(int((~task.fooled).sum()), 1)), []
    for first in range(0, len(routes_and_starts), at_once):
        states += _attempt(task, routes_and_starts[first : first + at_once])
    return states


def _attempt(task: _Task, routes_and_starts: Sequence[tuple[Tensor, Tensor]]) -> list[_State]:
    """Move images to their routes (-1: any expert) and attack them there, A attempts at once: A * B rows, attempt by attempt.

    An image that is fooled, in any attempt, is not attacked further. If the routers choose the forced route, the forced pass and
    the true pass are the same computation. A wrong class there therefore fools the true network.
    """
    count, search = len(routes_and_starts), task.search
    route, start = (torch.cat(parts) for parts in zip(*routes_and_starts, strict=True))
    x, y = task.x.repeat(count, 1, 1, 1), task.y.repeat(count)
    state = _State(route, start.clone(), torch.full_like(x[:, 0, 0, 0], -torch.inf))
    broke = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    rows = _unfooled_rows(task, broke)
    for number in range(search.num_steps + 1):
        if len(rows) == 0:
            break
        gradient, logits, routed, loss = _forward_backward(
            task.model, state.x_adv[rows], y[rows], route[rows], number / search.num_steps
        )
        better = routed & (loss > state.loss[rows])
        state.loss[rows[better]] = loss[better].to(state.loss)  # a network may compute in float64
        broke[rows] = routed & (predicted(logits) != y[rows])
        if number < search.num_steps:
            moved = project(state.x_adv[rows] + search.step(number) * gradient.sign(), x[rows], search.epsilon)
            state.x_adv[rows] = torch.where(broke[rows][:, None, None, None], state.x_adv[rows], moved)
        rows = _unfooled_rows(task, broke)
    if len(rows):  # last points that do not take the forced route but fool the true network on another one
        broke[rows] = predicted(task.model(state.x_adv[rows])) != y[rows]
    _keep(task, state, broke)
    parts = zip(*(tensor.chunk(count) for tensor in (state.route, state.x_adv, state.loss)), strict=True)
    return [_State(*part) for part in parts]


def _unfooled_rows(task: _Task, broke: Tensor) -> Tensor:
    """The rows of all attempts whose image no attempt has fooled. `broke` [A * B] bool: the rows that fool the network."""
    unfooled = ~(task.fooled | broke.view(-1, len(task.x)).any(dim=0))
    return unfooled.repeat(len(broke) // len(task.x)).nonzero()[:, 0]


def _keep(task: _Task, state: _State, broke: Tensor) -> None:
    """Write the first point of each image that fools the network to the results."""
    by_attempt = broke.view(-1, len(task.x))
    images = by_attempt.any(dim=0).nonzero()[:, 0]
    first = by_attempt.int().argmax(dim=0)[images]
    task.x_adv[images] = state.x_adv[first * len(task.x) + images]
    task.fooled[images] = True


def _forward_backward(
    model: Routed, x_adv: Tensor, y: Tensor, route: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of the loss, the logits on the route, whether the routers choose the route [B], and the class margin [B].

    The loss is the class margin minus WEIGHT times the routers' hinge loss. Before an image takes the route, its class margin
    has the weight `share`, which rises from 0 to 1 over the ascent; after that, the weight is 1.
    """
    with torch.enable_grad():
        leaf = x_adv.detach().requires_grad_(True)
        logits, routings = model.forward_routed(leaf, ForcedGate(route))
        router_margins, loss = margins(routings, route), margin(logits, y)
        hinge = (HOLD - router_margins).clamp(min=0).sum(dim=1)
        routed = (router_margins > 0).all(dim=1)
        (gradient,) = torch.autograd.grad((torch.where(routed, loss, share * loss) - WEIGHT * hinge).sum(), leaf)
    return gradient.nan_to_num(0), logits.detach(), routed, loss.detach()


def _with_change(route: Tensor, changes: Tensor, number: int) -> Tensor:
    """`route` with one more change: number `number` of the changes that are not in it, those of unforced layers first."""
    layers, experts = changes.unbind(dim=2)
    now = route.gather(1, layers)
    order = ((now >= 0).int() + (now == experts).int()).argsort(dim=1, stable=True)[:, number, None]
    return route.scatter(1, layers.gather(1, order), experts.gather(1, order))


def _best(states: Sequence[_State], width: int) -> list[_State]:
    """For each image the `width` states with the highest loss, as `width` batches."""
    order = torch.stack([state.loss for state in states], dim=1).argsort(dim=1, descending=True, stable=True)[:, :width]
    routes, points = torch.stack([state.route for state in states]), torch.stack([state.x_adv for state in states])
    row = torch.arange(len(order), device=order.device)
    losses = torch.stack([state.loss for state in states])
    return [_State(routes[rank, row], points[rank, row], losses[rank, row]) for rank in order.unbind(dim=1)]


def _no_forced_layer(model: Routed, x: Tensor) -> Tensor:
    """The route [B, L] that leaves every layer to its router."""
    return torch.full_like(route_of(model.forward_routed(x[:1], HARD)[1]), -1).repeat(len(x), 1)

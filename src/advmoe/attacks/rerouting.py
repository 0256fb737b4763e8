"""The route-aware attack: drive the routers to another pathway, then attack through it.

For each image the single changes of its pathway are ordered in two ways: by how little perturbation they should need (first
order: the router's margin over the L1 norm of its gradient), and by how far the class margin rises behind them. The first
ones of both orders are tried in turn, and the most promising are combined by beam search. With L layers and N experts that is
at most L * (N - 1) gradients and forward passes, and `budget` ascents, never a walk over N^L pathways.

Shapes: B images, L MoE layers, N experts, R candidate changes an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advmoe.attacks.draws import Draws
from advmoe.attacks.geometry import project
from advmoe.attacks.objectives import margin
from advmoe.attacks.surrogate import Routed, Search, margins, route_of
from advmoe.moe import HARD, ForcedGate, Routing

HOLD = 0.05  # a router's margin is pushed up to this before the experts are attacked
WEIGHT = 10.0  # of the routers' hinge against the class margin
PROBE_STEPS = 3  # with which the class margin behind a change is estimated


@dataclass(frozen=True)
class Beam:
    """`singles`: changes tried alone; then `depth` - 1 rounds combine the best `width` with `branches` further ones."""

    singles: int = 4
    width: int = 2
    branches: int = 2
    depth: int = 3

    @property
    def budget(self) -> int:
        """Ascents per image at most, each of two forward passes more than it has steps."""
        return self.singles + (self.depth - 1) * self.width * self.branches


@torch.no_grad()
def reroute(model: Routed, x: Tensor, y: Tensor, search: Search, beam: Beam, draws: Draws) -> Tensor:
    """x' [B, C, H, W] in the L-infinity ball: a point that fools the network over another pathway where one was found,
    else the image itself. `model` should be frozen.
    """
    start = project(x + search.epsilon * draws.uniform(x), x, search.epsilon)
    cheap = cheapest_changes(model, x)
    changes = in_turn(cheap, weakest_changes(model, x, y, cheap, search.epsilon, 2 * beam.singles))
    found = _Found(x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device))
    free = torch.full((len(x), _num_layers(model, x)), -1, dtype=torch.long, device=x.device)
    states = [
        _attempt(model, x, y, _with_change(free, changes, number), start, search, found)
        for number in range(min(beam.singles, changes.shape[1]))
    ]
    for _ in range(1, beam.depth if states else 1):
        states = [
            _attempt(model, x, y, _with_change(state.route, changes, branch), state.x_adv, search, found)
            for state in _best(states, beam.width)
            for branch in range(min(beam.branches, changes.shape[1]))
        ]
    return found.x_adv


def cheapest_changes(model: Routed, x: Tensor) -> Tensor:
    """(layer, expert) pairs [B, R, 2] that an image does not take now, cheapest to reach first; R = sum of (N - 1)."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        _, routings = model.forward_routed(leaf, HARD)
        costs, pairs = [], []
        for layer, routing in enumerate(routings):
            for expert in range(routing.logits.shape[1]):
                costs.append(_cost(leaf, routing, expert))
                pairs.append((layer, expert))
    if not costs:
        return torch.zeros(len(x), 0, 2, dtype=torch.long, device=x.device)
    others = len(costs) - len(routings)  # a layer's own expert costs infinity and comes last
    order = torch.stack(costs, dim=1).argsort(dim=1, stable=True)[:, :others]
    return torch.tensor(pairs, device=x.device)[order]


def weakest_changes(model: Routed, x: Tensor, y: Tensor, changes: Tensor, epsilon: float, probes: int) -> Tensor:
    """`changes` [B, R, 2] by the class margin behind them, highest first.

    The margin is taken with the change forced: at the image for all changes, and for the first `probes` of these after a few
    steps with the change held.
    """
    if not changes.shape[1]:
        return changes
    free = torch.full((len(x), _num_layers(model, x)), -1, dtype=torch.long, device=x.device)
    routes = [free.scatter(1, change[:, :1], change[:, 1:]) for change in changes.unbind(dim=1)]
    at_image = torch.stack([_forced_margin(model, x, y, route) for route in routes], dim=1)
    changes = _reordered(changes, at_image)
    values = at_image.sort(dim=1, descending=True, stable=True).values
    for number in range(min(probes, changes.shape[1])):
        route = free.scatter(1, changes[:, number, :1], changes[:, number, 1:])
        values[:, number] = torch.maximum(values[:, number], _margin_behind(model, x, y, route, epsilon))
    values[:, probes:] -= 1e6  # what was not probed stays behind
    return _reordered(changes, values)


def in_turn(first: Tensor, second: Tensor) -> Tensor:
    """Two orders of the same pairs [B, R, 2] as one: the best of the first, the best other one of the second, and so on."""
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
    """The class margin after a few steps on the network held on `route`."""
    z = x
    for _ in range(PROBE_STEPS):
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(_forced_margin(model, leaf, y, route).sum(), leaf, materialize_grads=True)
        z = project(z + epsilon / 2 * gradient.nan_to_num(0).sign(), x, epsilon)
    return _forced_margin(model, z, y, route)


def _cost(leaf: Tensor, routing: Routing, expert: int) -> Tensor:
    """First-order L-infinity distance to the point where `expert` is chosen; infinite where it is already."""
    gap = routing.logits.gather(1, routing.experts[:, None])[:, 0] - routing.logits[:, expert]
    slope = torch.zeros_like(gap)
    if gap.requires_grad:  # else the router is cut off from the image
        (gradient,) = torch.autograd.grad(gap.sum(), leaf, retain_graph=True, materialize_grads=True)
        slope = gradient.flatten(1).abs().sum(dim=1)
    distance = gap.detach() / slope.detach().clamp(min=1e-12)
    return torch.where(routing.experts == expert, torch.inf, torch.nan_to_num(distance, nan=1e30, posinf=1e30))


@dataclass
class _Found:
    """The best points so far, and which images are fooled; shared by all attempts on a batch."""

    x_adv: Tensor
    fooled: Tensor


@dataclass
class _State:
    """One pathway's attempt: its route, its last point, and the highest loss seen while routed there ([B])."""

    route: Tensor
    x_adv: Tensor
    loss: Tensor


def _attempt(model: Routed, x: Tensor, y: Tensor, route: Tensor, start: Tensor, search: Search, found: _Found) -> _State:
    """Drive to `route` [B, L] (-1: free) and attack through it; images already fooled are left out.

    While the routers agree with a forced route, the forced pass and the true one are the same computation, so a wrong
    class there fools the true network.
    """
    state = _State(route, start.clone(), torch.full_like(x[:, 0, 0, 0], -torch.inf))
    for number in range(search.num_steps + 1):
        rows = (~found.fooled).nonzero()[:, 0]
        if len(rows) == 0:
            break
        gradient, logits, routed, loss = _look(model, state.x_adv[rows], y[rows], route[rows], number / search.num_steps)
        better = routed & (loss > state.loss[rows])
        state.loss[rows[better]] = loss[better]
        fooled = routed & (logits.argmax(dim=1) != y[rows])
        found.x_adv[rows[fooled]] = state.x_adv[rows[fooled]]
        found.fooled[rows[fooled]] = True
        if number < search.num_steps:
            moved = project(state.x_adv[rows] + search.step(number) * gradient.sign(), x[rows], search.epsilon)
            state.x_adv[rows] = torch.where(found.fooled[rows][:, None, None, None], state.x_adv[rows], moved)
    _count_strays(model, y, state, found)
    return state


def _count_strays(model: Routed, y: Tensor, state: _State, found: _Found) -> None:
    """An end point that left its route may fool the true network over a third one."""
    rows = (~found.fooled).nonzero()[:, 0]
    if len(rows):
        rows = rows[model(state.x_adv[rows]).argmax(dim=1) != y[rows]]
        found.x_adv[rows] = state.x_adv[rows]
        found.fooled[rows] = True


def _look(model: Routed, x_adv: Tensor, y: Tensor, route: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of class margin and routers' hinge, logits on the route, whether the routers take it, the class margin.

    The routers come first. The class margin counts in full once the route is taken, and before with a weight `share` that rises
    from 0 to 1 along the ascent: a joint attack whose trade-off is annealed.
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
    """`route` with one more change: number `number` of those new to it, cheapest first, and layers left free before others."""
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


def _num_layers(model: Routed, x: Tensor) -> int:
    return route_of(model.forward_routed(x[:1], HARD)[1]).shape[1]

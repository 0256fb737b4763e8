"""Attacks on the network with its routes fixed to one pathway after another, whether images can reach the pathway or not.

Every adversarial image takes some pathway. If an image survives the attacks on all pathways, no attack on the routing can break
it, as far as attacks on a fixed pathway are strong. The accuracy over all pathways is therefore an estimate from below.

Shapes: B images, L choices, K pathways.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import prod

import torch
from torch import Tensor

from advmoe.attacks.apgd import Apgd, apgd
from advmoe.attacks.draws import ImageDraws, derive_seed
from advmoe.attacks.job import Job, Setting
from advmoe.attacks.objectives import Objective, cross_entropy, dlr, margin, predicted
from advmoe.attacks.pgd import Pgd, Predict, pgd
from advmoe.attacks.rerouting import cheapest_changes
from advmoe.attacks.surrogate import Routed, Search, route_of, surrogate_pgd, through_route
from advmoe.moe import ForcedGate

CHEAPEST, RANDOM = 3, 4  # above the budget: the clean pathway, this many of its cheapest changes, and this many random pathways
SAMPLED = 1 + CHEAPEST + RANDOM
PathwayAttack = Callable[[Job, Tensor, range], Tensor]  # job, all pathways [B, K, L], numbers of those to attack -> points
STEPS = 40  # of APGD on each of the two losses; PGD from the clean image takes half as many


@torch.no_grad()
def num_pathways(model: Routed, x: Tensor) -> int:
    """How many pathways the network has: the product of its choices' numbers of experts."""
    return prod(routing.logits.shape[1] for routing in model.forward_routed(x[:1])[1])


@torch.no_grad()
def pathways(job: Job) -> tuple[Tensor, bool]:
    """The pathways to attack for each image, [B, K, L] int64, and whether these are all pathways.

    They are if the budget allows; otherwise they are the clean one, its cheapest changes, and random ones.
    """
    model, x = job.predict, job.x
    routings = model.forward_routed(x)[1]
    experts = [routing.logits.shape[1] for routing in routings]
    if prod(experts) <= job.pathway_budget:
        return torch.tensor(list(product(*map(range, experts))), device=x.device).expand(len(x), -1, -1), True
    clean, changes = route_of(routings), cheapest_changes(model, x)[:, :CHEAPEST]
    cheap = [clean.scatter(1, change[:, :1], change[:, 1:]) for change in changes.unbind(dim=1)]
    generator = torch.Generator().manual_seed(derive_seed(job.seed, 20))
    drawn = [[int(torch.randint(number, (), generator=generator)) for number in experts] for _ in range(RANDOM)]
    random = [torch.tensor(route, device=x.device).expand(len(x), -1) for route in drawn]
    return torch.stack([clean, *cheap, *random], dim=1), False


@torch.no_grad()
def attack_pathways(job: Job) -> Tensor:
    """x' [B, C, H, W] that fool the network, or the network with a fixed pathway. An image is not attacked again once it is fooled.

    If all pathways are attacked, each gets PGD from the clean image, then APGD on cross-entropy and on the difference of logits
    ratio, both from random starts. Otherwise each gets one ascent on cross-entropy and one on the margin, and several pathways are
    attacked at once, as many as `job.batch_size` allows.
    """
    (routes, enumerated), x_adv = pathways(job), job.x.clone()
    rows, number = torch.arange(len(job.x), device=job.x.device), 0
    attacks: Sequence[PathwayAttack] = _on_common if enumerated else _on_different
    while len(rows) and number < routes.shape[1]:
        numbers = range(number, min(number + (1 if enumerated else max(1, job.batch_size // len(rows))), routes.shape[1]))
        number = numbers.stop
        for attack in attacks:
            if not len(rows):
                break
            part = replace(job, x=job.x[rows], y=job.y[rows], images=[job.images[row] for row in rows.tolist()])
            end_points = attack(part, routes[rows], numbers)
            points, fooled = _first_fooling(part, routes[rows], numbers, end_points)
            x_adv[rows[fooled]] = points[fooled]
            rows = rows[~fooled]
    return x_adv


def _first_fooling(job: Job, routes: Tensor, numbers: range, end_points: Tensor) -> tuple[Tensor, Tensor]:
    """For each image the first of its `end_points` [K * B, C, H, W] that fools the network, else one that fools a fixed pathway.

    Returns points [B, C, H, W], and which of them fool: [B] bool.
    """
    count, y = len(numbers), job.y.repeat(len(numbers))
    on_route = predicted(with_fixed_route(job.predict, _one_after_another(routes, numbers))(end_points)) != y
    worth = (2 * (predicted(job.predict(end_points)) != y) + on_route).view(count, -1)
    best = worth.argmax(dim=0)
    image = torch.arange(len(job.x), device=best.device)
    return end_points[best * len(job.x) + image], worth.amax(dim=0) > 0


def _one_after_another(routes: Tensor, numbers: range) -> Tensor:
    """The pathways `numbers` of `routes` [B, K, L] for all images, pathway by pathway: [len(numbers) * B, L]."""
    return routes[:, numbers.start : numbers.stop].transpose(0, 1).flatten(0, 1)


def _pgd(job: Job, routes: Tensor, numbers: range) -> Tensor:
    settings = Pgd(job.epsilon, job.epsilon / 4, STEPS // 2, start="none")
    return pgd(with_fixed_route(job.predict, routes[:, numbers.start]), job.x, job.y, settings, job.draws(21, numbers.start))


def _apgd(job: Job, routes: Tensor, numbers: range, objective: Objective, stream: int) -> Tensor:
    """APGD on a pathway that all images share: its batch shrinks, so a route must not belong to a single row."""
    common = routes[0, numbers.start]

    def predict(x: Tensor) -> Tensor:
        return with_fixed_route(job.predict, common.expand(len(x), -1))(x)

    return apgd(predict, job.x, job.y, Apgd(job.epsilon, STEPS), job.draws(stream, numbers.start), objective)


def _ascent(job: Job, routes: Tensor, numbers: range, objective: Objective, stream: int) -> Tensor:
    surrogate = through_route(job.predict, _one_after_another(routes, numbers), objective)
    x, y = job.x.repeat(len(numbers), 1, 1, 1), job.y.repeat(len(numbers))
    draws = ImageDraws.joined([job.draws(stream, number) for number in numbers])
    return surrogate_pgd(job.predict, surrogate, x, y, Search(job.epsilon, STEPS), draws)


_on_common = (_pgd, partial(_apgd, objective=cross_entropy, stream=22), partial(_apgd, objective=dlr, stream=23))
_on_different = (partial(_ascent, objective=cross_entropy, stream=22), partial(_ascent, objective=margin, stream=23))


def with_fixed_route(model: Routed, route: Tensor) -> Predict:
    """The network with its route fixed to `route` [B, L]: it returns the logits for a batch of the same B images."""
    return lambda x: model.forward_routed(x, ForcedGate(route))[0]


@torch.no_grad()
def broken_on_a_pathway(job: Job, x_adv: Tensor) -> Tensor:
    """Which x' fool the network with any of the pathways fixed: [B] bool. Logits that are not finite count as wrong."""
    routes, _ = pathways(job)
    broken = torch.zeros(len(x_adv), dtype=torch.bool, device=x_adv.device)
    for number in range(routes.shape[1]):
        broken |= predicted(with_fixed_route(job.predict, routes[:, number])(x_adv)) != job.y
    return broken


def obstacle(setting: Setting) -> str:
    """Why no pathway is attacked; empty if some are."""
    return "" if setting.pathway_budget else "the pathway budget is 0, so RA-worst is reported without RA-paths"


def notice(pathways: int, budget: int) -> str:
    """What is run instead if a network has more pathways than the budget; empty if it has not."""
    if not 0 < budget < pathways:
        return ""
    return (
        f"the network has {pathways:,} pathways, more than the budget of {budget:,}: {SAMPLED} of them are tried instead "
        "(RA-paths, sampled), which gives no lower bound"
    )

"""What attacks do to the routes: flips, overlap, load, and whether router or experts are at fault."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks import Pgd, pgd
from advmoe.attacks.job import Job
from advmoe.attacks.surrogate import Routed, route_of
from advmoe.evaluation.store import RoutingCounts
from advmoe.moe import ForcedGate, Routing


def total(counts: Sequence[RoutingCounts]) -> RoutingCounts:
    """The counts of several batches as one."""
    return RoutingCounts(**{name: _added([getattr(count, name) for count in counts]) for name in RoutingCounts.model_fields})


def _added(values: Sequence[Any]) -> Any:
    """The sum of numbers, or of lists of lists of numbers entry by entry."""
    return [_added(entries) for entries in zip(*values, strict=True)] if isinstance(values[0], list) else sum(values)


@torch.no_grad()
def routing_counts(model: Routed, job: Job, correct: Sequence[int], pgd_10: Tensor, pgd_50: Tensor) -> RoutingCounts:
    """Counts over a shard's images, given their x' under PGD-10 and PGD-50 (those of the figures).

    `flipped`: correctly classified images with any changed route; `overlap` [L]: of these images, those that keep the layer's
    expert; `load` and `load_adv` [L][N]; `router`, `expert`: correctly classified images that stay right when only the route,
    or only the experts' input, is adversarial (RA-router, RA-expert); `fixed` and `fixed_robust` [N]: images that are right
    with expert e in every layer, clean and under PGD-10 on that network (a layer of fewer experts takes its last);
    `gained` and `lost` [N]: images that only the routed network gets right under PGD-10, and those that only expert e does.
    """
    x, y = job.x, job.y
    (_, clean), (_, adversarial) = (model.forward_routed(z) for z in (x, pgd_50))
    route, route_adv = route_of(clean), route_of(adversarial)
    known = torch.tensor([row in set(correct) for row in job.images], device=x.device)
    same = route == route_adv
    over_adversarial_route = model.forward_routed(x, ForcedGate(route_adv))[0].argmax(dim=1) == y
    over_clean_route = model.forward_routed(pgd_50, ForcedGate(route))[0].argmax(dim=1) == y
    routed = known & (model.forward_routed(pgd_10)[0].argmax(dim=1) == y)
    experts = torch.tensor([routing.logits.shape[1] for routing in clean], device=x.device)
    fixed = [_fixed(model, x, y, expert, experts, job) for expert in range(int(experts.max()))]
    return RoutingCounts(
        images=len(y), correct=int(known.sum()), flipped=int((~same.all(dim=1) & known).sum()),
        overlap=same[known].sum(dim=0).tolist(), load=_load(clean), load_adv=_load(adversarial),
        router=int((over_adversarial_route & known).sum()), expert=int((over_clean_route & known).sum()),
        fixed=[int(right.sum()) for right, _ in fixed], fixed_robust=[int(robust.sum()) for _, robust in fixed],
        gained=[int((routed & ~robust).sum()) for _, robust in fixed], lost=[int((robust & ~routed).sum()) for _, robust in fixed],
    )  # fmt: skip


def _fixed(model: Routed, x: Tensor, y: Tensor, expert: int, experts: Tensor, job: Job) -> tuple[Tensor, Tensor]:
    """Which images are right with `expert` in every layer (of `experts` [L] each), clean and under PGD-10 on that network."""
    route = (experts - 1).clamp(max=expert)

    def predict(z: Tensor) -> Tensor:
        forced = route.expand(len(z), -1)
        return model.forward_routed(z, ForcedGate(forced))[0]

    right = predict(x).argmax(dim=1) == y
    settings = Pgd(job.epsilon, job.epsilon / 4, 10, norm=job.norm)
    x_adv = pgd(predict, x, y, settings, job.draws(6, expert))
    return right, right & (predict(x_adv).argmax(dim=1) == y)


def _load(routings: Sequence[Routing]) -> list[list[int]]:
    return [torch.bincount(routing.experts, minlength=routing.logits.shape[1]).tolist() for routing in routings]

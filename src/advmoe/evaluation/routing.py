"""What attacks do to the routes: flips, overlap, load, and whether router or experts are at fault."""

from collections.abc import Sequence

import torch
from torch import Tensor

from advmoe.attacks import Pgd, pgd
from advmoe.attacks.job import Job
from advmoe.attacks.surrogate import Routed, route_of
from advmoe.evaluation.store import RoutingCounts
from advmoe.moe import ForcedGate, Routing


@torch.no_grad()
def routing_counts(model: Routed, job: Job, correct: Sequence[int]) -> RoutingCounts:
    """Counts over a shard's images under PGD-50 (the same x' as the figure's).

    `flipped`: correctly classified images with any changed route; `overlap` [L]: of these images, those that keep the layer's
    expert; `load` and `load_adv` [L][N]; `router`, `expert`: correctly classified images that stay right when only the route,
    or only the experts' input, is adversarial (RA-router, RA-expert); `fixed` and `fixed_robust` [N]: images that are right
    with expert e in every layer, clean and under PGD-10 (a layer of fewer experts takes its last).
    """
    x, y = job.x, job.y
    settings = Pgd(job.epsilon, job.epsilon / 4, 50, norm=job.norm)
    x_adv = pgd(job.predict, x, y, settings, job.draws(0))
    clean, adversarial = (model.forward_routed(z)[1] for z in (x, x_adv))
    route, route_adv = route_of(clean), route_of(adversarial)
    known = torch.tensor([row in set(correct) for row in job.images], device=x.device)
    same = route == route_adv
    over_adversarial_route = model.forward_routed(x, ForcedGate(route_adv))[0].argmax(dim=1) == y
    over_clean_route = model.forward_routed(x_adv, ForcedGate(route))[0].argmax(dim=1) == y
    experts = torch.tensor([routing.logits.shape[1] for routing in clean], device=x.device)
    fixed = [_fixed(model, x, y, expert, experts, job) for expert in range(int(experts.max()))]
    return RoutingCounts(
        images=len(y), correct=int(known.sum()), flipped=int((~same.all(dim=1) & known).sum()),
        overlap=same[known].sum(dim=0).tolist(), load=_load(clean), load_adv=_load(adversarial),
        router=int((over_adversarial_route & known).sum()), expert=int((over_clean_route & known).sum()),
        fixed=[hits for hits, _ in fixed], fixed_robust=[hits for _, hits in fixed],
    )  # fmt: skip


def _fixed(model: Routed, x: Tensor, y: Tensor, expert: int, experts: Tensor, job: Job) -> tuple[int, int]:
    """Images right with `expert` in every layer (of `experts` [L] each), clean and under PGD-10 on that network."""
    route = (experts - 1).clamp(max=expert)

    def predict(z: Tensor) -> Tensor:
        forced = route.expand(len(z), -1)
        return model.forward_routed(z, ForcedGate(forced))[0]

    right = predict(x).argmax(dim=1) == y
    settings = Pgd(job.epsilon, job.epsilon / 4, 10, norm=job.norm)
    x_adv = pgd(predict, x, y, settings, job.draws(6, expert))
    return int(right.sum()), int((right & (predict(x_adv).argmax(dim=1) == y)).sum())


def _load(routings: Sequence[Routing]) -> list[list[int]]:
    return [torch.bincount(routing.experts, minlength=routing.logits.shape[1]).tolist() for routing in routings]

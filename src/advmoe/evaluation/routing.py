"""How attacks change the routes: flips, overlap and load, and whether the routers or the experts are fooled."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypeIs

from advmoe.attacks import evaluation_pgd, pgd
from advmoe.attacks.job import Job
from advmoe.attacks.objectives import predicted
from advmoe.attacks.registry import ATTACKS, run_attack
from advmoe.attacks.surrogate import Routed, route_of
from advmoe.evaluation.store import RoutingCounts
from advmoe.moe import ForcedGate, Routing

FIXED_ATTACK = "apgd_margin_t"  # on a network with a fixed expert, after PGD-10
VERSION = 3  # raise it when the counts change; stored ones of another version are counted again


def versions() -> list[int]:
    """The versions of what gives the counts: this module, PGD, and the attack on a network with a fixed expert."""
    return [VERSION, ATTACKS["pgd_50"].version, ATTACKS[FIXED_ATTACK].version]


def is_counted(counts: RoutingCounts | None) -> TypeIs[RoutingCounts]:
    """Whether a shard has counts of the present versions."""
    return counts is not None and counts.versions == versions()


def total(counts: Sequence[RoutingCounts]) -> RoutingCounts:
    """The sum of the counts of several batches or shards of the same versions, with the rows of all."""
    fields = {name: [getattr(count, name) for count in counts] for name in RoutingCounts.model_fields}
    given, kept = fields.pop("versions"), fields.pop("kept")
    joined = [list(chain.from_iterable(rows)) for rows in zip(*kept, strict=True)]
    return RoutingCounts(**{name: _added(values) for name, values in fields.items()}, kept=joined, versions=given[0])


def _added(values: Sequence[Any]) -> Any:
    """The sum of numbers, or the entry-wise sum of lists of lists of numbers."""
    return [_added(entries) for entries in zip(*values, strict=True)] if isinstance(values[0], list) else sum(values)


@torch.no_grad()
def routing_counts(model: Routed, job: Job, correct: Sequence[int], pgd_10: Tensor, pgd_50: Tensor) -> RoutingCounts:
    """Counts over a shard's images, given their x' under PGD-10 and PGD-50 of the figures.

    - `flipped`: correctly classified images whose route changes in any layer. `overlap` [L]: correctly classified images that keep
      the layer's expert.
    - `load`, `load_adv` [L][N]: images of each expert, clean and under PGD-50.
    - `router`, `expert`: correctly classified images that are still correct if only the route, or only the experts' input, is
      adversarial (RA-router, RA-expert).
    - `fixed`, `fixed_robust` [N]: images that are correct with expert e in every layer, clean and under PGD-10 on that network. A
      layer with fewer experts takes its last one.
    - `gained`, `lost` [N]: images that are correct under PGD-10 only in the routed network, and only with expert e.
    - `kept` [N]: rows of the images that are correct with expert e under PGD-10, and then under `FIXED_ATTACK`, on that network. A
      fixed route hides no gradients.
    """
    x, y = job.x, job.y
    (_, clean), (_, adversarial) = (model.forward_routed(z) for z in (x, pgd_50))
    route, route_adv = route_of(clean), route_of(adversarial)
    rows = set(correct)
    known = torch.tensor([row in rows for row in job.images], device=x.device)
    same = route == route_adv
    over_adversarial_route = predicted(model.forward_routed(x, ForcedGate(route_adv))[0]) == y
    over_clean_route = predicted(model.forward_routed(pgd_50, ForcedGate(route))[0]) == y
    routed = known & (predicted(model.forward_routed(pgd_10)[0]) == y)
    experts = torch.tensor([routing.logits.shape[1] for routing in clean], device=x.device)
    fixed = [_fixed(model, x, y, expert, experts, job) for expert in range(int(experts.max()))]
    return RoutingCounts(
        images=len(y), correct=int(known.sum()), flipped=int((~same.all(dim=1) & known).sum()),
        overlap=same[known].sum(dim=0).tolist(), load=_load(clean), load_adv=_load(adversarial),
        router=int((over_adversarial_route & known).sum()), expert=int((over_clean_route & known).sum()),
        fixed=[int(is_correct.sum()) for is_correct, _, _ in fixed], fixed_robust=[int(robust.sum()) for _, robust, _ in fixed],
        gained=[int((routed & ~robust).sum()) for _, robust, _ in fixed],
        lost=[int((robust & ~routed).sum()) for _, robust, _ in fixed],
        kept=[[row for row, flag in zip(job.images, kept.tolist(), strict=True) if flag] for _, _, kept in fixed],
        versions=versions(),
    )  # fmt: skip


def _fixed(model: Routed, x: Tensor, y: Tensor, expert: int, experts: Tensor, job: Job) -> tuple[Tensor, Tensor, Tensor]:
    """Which images [B] bool are correct with `expert` in every layer: clean, under PGD-10 on that network, and then `FIXED_ATTACK`.

    `experts` [L] are the layers' numbers of experts.
    """
    route = (experts - 1).clamp(max=expert)

    def predict(z: Tensor) -> Tensor:
        forced = route.expand(len(z), -1)
        return model.forward_routed(z, ForcedGate(forced))[0]

    correct = predicted(predict(x)) == y
    settings = evaluation_pgd(job.epsilon, 10, job.norm)
    x_adv = pgd(predict, x, y, settings, job.draws(6, expert))
    robust = correct & (predicted(predict(x_adv)) == y)
    kept, left = robust.clone(), robust.nonzero()[:, 0]
    if len(left):
        rows = [job.images[row] for row in left.tolist()]
        survivors = replace(job, predict=predict, x=x[left], y=y[left], images=rows)
        kept[left] = predicted(predict(run_attack(FIXED_ATTACK, survivors))) == y[left]
    return correct, robust, kept


def _load(routings: Sequence[Routing]) -> list[list[int]]:
    return [torch.bincount(routing.experts, minlength=routing.logits.shape[1]).tolist() for routing in routings]

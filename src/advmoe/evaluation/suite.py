"""The attacks an evaluation runs, as data: name -> what it does to a shard of images.

Each takes a Job and gives x'; whether x' fools is decided by the runner, on the true network in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks import Apgd, ImageDraws, Norm, Pgd, apgd, derive_seed, dlr, pgd, surrogate, targeted_apgd
from advmoe.attacks.pgd import Predict
from advmoe.attacks.rerouting import Beam, reroute
from advmoe.attacks.surrogate import Search, Surrogate, route_of, surrogate_pgd
from advmoe.errors import UserError, lookup
from advmoe.moe import Gate


@dataclass(frozen=True)
class Job:
    """Images of one shard under attack: `predict` is the network (frozen), `images` their numbers in the test set.

    `epsilon` in pixels of [0, 1]; `shard` seeds what cannot be seeded for each image.
    """

    predict: Any
    x: Tensor
    y: Tensor
    images: Sequence[int]
    epsilon: float
    norm: Norm
    seed: int
    shard: int
    num_classes: int
    transfer: Predict | None = None

    def draws(self, *numbers: int) -> ImageDraws:
        """Noise that depends on seed, image and `numbers` alone."""
        return ImageDraws(derive_seed(self.seed, *numbers), self.images)


@dataclass(frozen=True)
class Attack:
    """`needs` is "routing" or "transfer" where the attack makes no sense without; `norms` it is written for; its loss
    is defined from `min_classes` on."""

    run: Callable[[Job], Tensor]
    needs: str = ""
    norms: tuple[str, ...] = ("Linf",)
    min_classes: int = 2


def run_pgd(job: Job, steps: int, restarts: int = 1) -> Tensor:
    """PGD on cross-entropy, step 2/255 at epsilon 8/255, random start; of several restarts the first that fools counts."""
    settings, draws = Pgd(job.epsilon, job.epsilon / 4, steps, norm=job.norm), job.draws(0)
    best = pgd(job.predict, job.x, job.y, settings, draws)
    for _ in range(restarts - 1):
        with torch.no_grad():
            fooled = job.predict(best).argmax(dim=1) != job.y
        best = torch.where(fooled[:, None, None, None], best, pgd(job.predict, job.x, job.y, settings, draws))
    return best


def run_apgd(job: Job) -> Tensor:
    """APGD on cross-entropy."""
    return apgd(job.predict, job.x, job.y, Apgd(job.epsilon, norm=job.norm), job.draws(1))


def run_apgd_dlr(job: Job) -> Tensor:
    """APGD on the difference of logits ratio."""
    return apgd(job.predict, job.x, job.y, Apgd(job.epsilon, norm=job.norm), job.draws(2), dlr)


def run_targeted_apgd(job: Job) -> Tensor:
    """APGD on the targeted DLR, one wrong class after another."""
    return targeted_apgd(job.predict, job.x, job.y, Apgd(job.epsilon, norm=job.norm), job.draws(3))


def autoattack() -> Any:
    """The package's class. Raises UserError where the extra is missing."""
    try:
        from pyautoattack import AutoAttack  # noqa: PLC0415
    except ImportError:
        raise UserError("AutoAttack needs the extra autoattack: pip install 'advmoe[autoattack]'") from None
    return AutoAttack


def run_autoattack(job: Job, part: str, version: str = "standard") -> Tensor:
    """One member of AutoAttack (Croce & Hein 2020), by the package that carries the official code."""
    with torch.random.fork_rng(devices=[job.x.device] if job.x.is_cuda else []):
        suite = autoattack()(
            job.predict, norm=job.norm, eps=job.epsilon, version=version, device=job.x.device,
            seed=derive_seed(job.seed, job.shard) % 2**31,
        )  # fmt: skip
        suite.verbose = False
        suite.attacks_to_run = [part]
        suite.apgd_targeted.n_target_classes = min(suite.apgd_targeted.n_target_classes, job.num_classes - 1)
        suite.fab.n_target_classes = min(suite.fab.n_target_classes, job.num_classes - 1)
        x_adv: Tensor = suite.run_standard_evaluation(job.x, job.y, batch_size=len(job.x))[0]
    return x_adv.detach()


def run_reroute(job: Job, beam: Beam, steps: int) -> Tensor:
    """Drive to other pathways, cheapest first, and attack through them."""
    return reroute(job.predict, job.x, job.y, Search(job.epsilon, steps), beam, job.draws(4))


def run_surrogate(job: Job, make: Callable[[Job], Surrogate], stream: int, steps: int = 50) -> Tensor:
    """One ascent through a surrogate."""
    return surrogate_pgd(job.predict, make(job), job.x, job.y, Search(job.epsilon, steps), job.draws(5, stream))


def gate(kind: Any, temperature: float) -> Callable[[Job], Surrogate]:
    """The network under another gate."""
    return lambda job: surrogate.through_gate(job.predict, Gate(kind, temperature))


def margin(weight: float) -> Callable[[Job], Surrogate]:
    """Cross-entropy and the margin of the clean route."""
    return lambda job: surrogate.with_routing_margin(job.predict, _clean_route(job), weight)


def held_route(job: Job) -> Surrogate:
    """The network held on the clean route."""
    return surrogate.through_route(job.predict, _clean_route(job))


def second_route(job: Job) -> Surrogate:
    """The network held on every router's second choice."""
    with torch.no_grad():
        _, routings = job.predict.forward_routed(job.x)
    second = [routing.logits.topk(min(2, routing.logits.shape[1]), dim=1).indices[:, -1] for routing in routings]
    return surrogate.through_route(job.predict, torch.stack(second, dim=1))


def other_network(job: Job) -> Surrogate:
    """The network that attacks are transferred from."""
    assert job.transfer is not None
    return surrogate.through_network(job.transfer)


def _clean_route(job: Job) -> Tensor:
    with torch.no_grad():
        return route_of(job.predict.forward_routed(job.x)[1])


def _surrogates() -> dict[str, Attack]:
    makers: dict[str, Callable[[Job], Surrogate]] = {
        **{f"straight_through_{t:g}": gate("straight_through", t) for t in (0.2, 1.0, 5.0)},
        **{f"soft_{t:g}": gate("soft", t) for t in (0.2, 1.0, 5.0)},
        **{f"margin_{weight:+g}": margin(weight) for weight in (-1.0, -0.1, 0.1, 1.0)},
        "held_route": held_route,
        "second_route": second_route,
    }
    return {name: Attack(partial(run_surrogate, make=make, stream=i), "routing") for i, (name, make) in enumerate(makers.items())}


BOTH = ("Linf", "L2")
AUTOATTACK = ("aa_apgd-ce", "aa_apgd-t", "aa_fab-t", "aa_square")
AUTOATTACK_PLUS = tuple(f"aaplus_{part}" for part in ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"))
AUTOATTACK_RAND = tuple(f"aarand_{part}" for part in ("apgd-ce", "apgd-dlr"))
VERSIONS = {"aa": "standard", "aaplus": "plus", "aarand": "rand"}
SORTED_LOGITS = {"apgd-dlr": 3, "apgd-t": 4}  # how many the official DLR losses look at


def _autoattack(version: str, part: str) -> Attack:
    return Attack(partial(run_autoattack, part=part, version=VERSIONS[version]), norms=BOTH, min_classes=SORTED_LOGITS.get(part, 2))


ATTACKS: dict[str, Attack] = {
    **{f"pgd_{steps}": Attack(partial(run_pgd, steps=steps), norms=BOTH) for steps in (10, 20, 50, 200)},
    "pgd_50x10": Attack(partial(run_pgd, steps=50, restarts=10), norms=BOTH),
    "apgd_ce": Attack(run_apgd, norms=BOTH),
    "apgd_dlr": Attack(run_apgd_dlr, norms=BOTH),
    "apgd_t": Attack(run_targeted_apgd, norms=BOTH),
    **{name: _autoattack(*name.split("_")) for name in AUTOATTACK + AUTOATTACK_PLUS + AUTOATTACK_RAND},
    **_surrogates(),
    "reroute_quick": Attack(partial(run_reroute, beam=Beam(2, 1, 1, 2), steps=20), "routing"),
    "reroute": Attack(partial(run_reroute, beam=Beam(), steps=40), "routing"),
    "reroute_full": Attack(partial(run_reroute, beam=Beam(12, 4, 3, 4), steps=60), "routing"),
    "transfer": Attack(partial(run_surrogate, make=other_network, stream=99), "transfer"),
}

RA_FIGURES: dict[str, tuple[str, ...]] = {"ra_10": ("pgd_10",), "ra_20": ("pgd_20",), "ra_50": ("pgd_50",)}
ROUTE_QUICK = ("straight_through_1", "reroute_quick")
ROUTE = (
    "straight_through_1", "straight_through_5", "soft_1", "margin_-1", "margin_+1", "held_route", "second_route",
    "reroute", "transfer",
)  # fmt: skip
ROUTE_FULL = (
    *(name for name in _surrogates()),
    "apgd_ce",
    "apgd_dlr",
    "apgd_t",
    "pgd_200",
    "pgd_50x10",
    "reroute_full",
    "transfer",
)


@dataclass(frozen=True)
class Preset:
    """`figures`: name -> attacks, each figure in a chain of its own over every correctly classified image.
    `survivors`: run on what AutoAttack (or, without it, every figure) left standing. `budget` says the cost in words,
    to which the figures of a network that routes add ROUTING_BUDGET.
    """

    figures: dict[str, tuple[str, ...]]
    survivors: tuple[str, ...]
    checks: bool
    budget: str

    @property
    def attacks(self) -> list[str]:
        """Every attack, once, in the order in which they are run."""
        return list(dict.fromkeys(name for names in (*self.figures.values(), self.survivors) for name in names))


ROUTING_BUDGET = "routing figures: 50 PGD steps an image, and 10 for each expert"
PRESETS = {
    "quick": Preset(
        RA_FIGURES, ROUTE_QUICK, False, "80 PGD steps an image; at most 110 route-aware steps on survivors; no AutoAttack"
    ),
    "standard": Preset(
        {**RA_FIGURES, "ra_aa": AUTOATTACK}, ROUTE, True,
        "80 PGD steps and standard AutoAttack an image; at most 830 route-aware, 50 transfer steps on survivors; all self-checks",
    ),
    "full": Preset(
        {**RA_FIGURES, "ra_aa": AUTOATTACK, "ra_aa_plus": AUTOATTACK_PLUS}, ROUTE_FULL, True,
        "80 PGD steps, standard AutoAttack and AutoAttack plus an image; at most 3,480 route-aware, 50 transfer, 700 PGD "
        "(PGD-200, and 10 restarts of PGD-50) and 1,100 APGD steps on survivors; all self-checks",
    ),
}  # fmt: skip


def plan(names: Sequence[str]) -> Preset:
    """A preset from attack names: a PGD or AutoAttack name is a figure of its own, the rest run on survivors.

    `autoattack`, `autoattack_plus` and `autoattack_rand` stand for their members. Raises UserError on unknown names,
    and where there is none.
    """
    if not names:
        raise UserError("no attack is named: clean accuracy alone says nothing about robustness")
    groups = {"autoattack": ("ra_aa", AUTOATTACK), "autoattack_plus": ("ra_aa_plus", AUTOATTACK_PLUS)}
    groups["autoattack_rand"] = ("ra_aa_rand", AUTOATTACK_RAND)
    figures: dict[str, tuple[str, ...]] = {}
    survivors: list[str] = []
    for name in names:
        if name in groups:
            figures[groups[name][0]] = groups[name][1]
        elif name.startswith("pgd_") and name in ATTACKS:
            figures[f"ra_{name.removeprefix('pgd_')}"] = (name,)
        else:
            lookup({**ATTACKS, **dict.fromkeys(groups)}, name, "attack")
            survivors.append(name)
    return Preset(figures, tuple(survivors), False, "as listed")

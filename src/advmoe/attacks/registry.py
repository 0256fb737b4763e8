"""The attacks that an evaluation can run, as data: what each needs, what it costs, its description, and how it runs.

A new attack is one entry of ATTACKS. An attack takes a Job and returns x' [B, C, H, W]. The evaluation then runs the true
network on x', in float32, and decides which of them fool it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from advmoe.attacks import autoattack, pathways, surrogate
from advmoe.attacks.apgd import Apgd, NetworkPair, apgd, targeted_apgd
from advmoe.attacks.gama import gama
from advmoe.attacks.job import Job, Setting
from advmoe.attacks.objectives import (
    Objective,
    cross_entropy,
    dlr,
    margin,
    probability_margin,
    scaled_cross_entropy,
    targeted_dlr,
    targeted_margin,
)
from advmoe.attacks.pgd import evaluation_pgd, pgd, pgd_points
from advmoe.attacks.rerouting import PROBE_STEPS, Beam, reroute
from advmoe.attacks.surrogate import Search, Surrogate, route_of, surrogate_pgd
from advmoe.attacks.unchanged import NetworkState
from advmoe.config.choices import Norm
from advmoe.entries import Entries, check_accepts, check_kind
from advmoe.errors import UserError, lookup
from advmoe.moe import make_gate

Needs = Literal["", "routing", "transfer"]
Kind = Literal["PGD", "APGD", "AutoAttack", "AutoAttack plus", "AutoAttack rand", "route-aware", "transfer", "other"]


@dataclass(frozen=True)
class Attack:
    """One attack.

    - `run` maps a Job to x' [B, C, H, W].
    - `words`: what it does, in one line, for the report.
    - `passes`: its forward and backward passes for one image, at most; a forward pass alone counts as a third. Those of `paths` are
      for a network of at most 8 pathways.
    - `needs`: "routing" or "transfer" if the attack needs a network that routes, or a network to transfer from.
    - `norms`: the norms that it supports. `min_classes`: the smallest number of classes.
    - `obstacle_of` returns any other reason why it cannot run.
    - `path`: the number of steps, for plain PGD; 0 otherwise. These attacks share one path of iterates.
    - `held` returns which x' fool the network with a fixed pathway, for an attack that fixes pathways.
    - `version`: raise it when you change what the attack does. Stored results of another version are computed again.
    """

    run: Callable[[Job], Tensor]
    words: str = ""
    passes: int = 50
    kind: Kind = "other"
    needs: Needs = ""
    norms: tuple[str, ...] = ("Linf",)
    min_classes: int = 2
    obstacle_of: Callable[[Setting], str] | None = None
    path: int = 0
    held: Callable[[Job, Tensor], Tensor] | None = None
    version: int = 1

    def obstacle(self, setting: Setting) -> str:
        """Why the attack cannot run; empty if it can."""
        if self.needs == "routing" and not setting.routed:
            return "the network does not route"
        if setting.norm not in self.norms:
            return f"works only in {' and '.join(self.norms)}"
        if self.needs == "transfer" and not setting.transfer:
            return "no network to transfer from was given"
        if setting.num_classes < self.min_classes:
            return f"needs {self.min_classes} classes"
        return "" if self.obstacle_of is None else self.obstacle_of(setting)


def run_pgd(job: Job, steps: int, restarts: int = 1) -> Tensor:
    """`evaluation_pgd` on cross-entropy."""
    settings = replace(evaluation_pgd(job.epsilon, steps, job.norm), restarts=restarts)
    return pgd(job.predict, job.x, job.y, settings, job.draws(0))


def follow_path(job: Job, steps: Sequence[int]) -> list[Tensor]:
    """The results of `run_pgd` for each number of steps, from one ascent. `steps` ascend."""
    settings = evaluation_pgd(job.epsilon, steps[-1], job.norm)
    return pgd_points(job.predict, job.x, job.y, settings, job.draws(0), steps)


def run_apgd(job: Job, objective: Objective, stream: int, steps: int = 100, restarts: int = 1) -> Tensor:
    """APGD on an untargeted objective."""
    settings = Apgd(job.epsilon, steps, restarts=restarts, norm=job.norm)
    return apgd(job.predict, job.x, job.y, settings, job.draws(stream), objective)


def run_targeted_apgd(job: Job, objective: Objective, stream: int, steps: int = 100, targets: int = 9) -> Tensor:
    """APGD on a targeted objective, towards the `targets` most likely wrong classes one after another."""
    settings = Apgd(job.epsilon, steps, norm=job.norm, num_targets=min(targets, job.num_classes - 1))
    return targeted_apgd(job.predict, job.x, job.y, settings, job.draws(stream), objective=objective)


def run_reroute(job: Job, beam: Beam, steps: int) -> Tensor:
    """Move images to other pathways, cheapest first, and attack them there (`advmoe.attacks.rerouting`)."""
    return reroute(job.predict, job.x, job.y, Search(job.epsilon, steps, job.batch_size), beam, job.draws(4))


def run_surrogate(job: Job, make: Callable[[Job], Surrogate], stream: int, steps: int = 50) -> Tensor:
    """One ascent on a surrogate (`advmoe.attacks.surrogate`)."""
    return surrogate_pgd(job.predict, make(job), job.x, job.y, Search(job.epsilon, steps), job.draws(5, stream))


def gate(name: str, temperature: float, objective: Objective = cross_entropy) -> Callable[[Job], Surrogate]:
    """An objective of the network under another gate."""
    return lambda job: surrogate.through_gate(job.predict, make_gate(name, temperature=temperature), objective)


def routing_margin(weight: float) -> Callable[[Job], Surrogate]:
    """Cross-entropy plus `weight` times the routers' margin in favour of the clean route."""
    return lambda job: surrogate.with_routing_margin(job.predict, _clean_route(job), weight)


def held_route(job: Job) -> Surrogate:
    """The network with its route fixed to the clean one."""
    return surrogate.through_route(job.predict, _clean_route(job))


def second_route(job: Job) -> Surrogate:
    """The network with its route fixed to every router's second choice."""
    with torch.no_grad():
        _, routings = job.predict.forward_routed(job.x)
    second = [routing.logits.topk(min(2, routing.logits.shape[1]), dim=1).indices[:, -1] for routing in routings]
    return surrogate.through_route(job.predict, torch.stack(second, dim=1))


def other_network(job: Job) -> Surrogate:
    """Cross-entropy of the network that attacks are transferred from."""
    source = job.transfer
    assert source is not None
    return lambda x, y, rows: cross_entropy(source(x), y)


def _clean_route(job: Job) -> Tensor:
    with torch.no_grad():
        return route_of(job.predict.forward_routed(job.x)[1])


BOTH = ("Linf", "L2")
SURROGATE_PASSES = 68  # 50 steps, after each a forward pass of the network itself, and one for its route
AUTOATTACK_PASSES = {"apgd-ce": 105, "apgd-dlr": 105, "apgd-t": 916, "fab": 135, "fab-t": 1213, "square": 1671}  # counted
AUTOATTACK_REPEATS = {  # restarts of aaplus; gradients that aarand averages in each step
    "aaplus_apgd-ce": 5, "aaplus_apgd-dlr": 5, "aaplus_fab": 5, "aarand_apgd-ce": 20, "aarand_apgd-dlr": 20,
}  # fmt: skip
AUTOATTACK_KINDS: dict[str, Kind] = {"aa": "AutoAttack", "aaplus": "AutoAttack plus", "aarand": "AutoAttack rand"}


def _pgd(steps: int) -> Attack:
    return Attack(
        partial(run_pgd, steps=steps), f"PGD on cross-entropy, {steps} steps of epsilon / 4, random start", steps, "PGD",
        norms=BOTH, path=steps,
    )  # fmt: skip


def _apgd(words: str, objective: Objective, stream: int, steps: int) -> Attack:
    run = partial(run_apgd, objective=objective, stream=stream, steps=steps)
    return Attack(run, f"{words}, {steps} steps", steps + 2, "APGD", norms=BOTH)


def _autoattack(name: str) -> Attack:
    version, part = name.split("_")
    return Attack(
        partial(autoattack.run_part, name=name), f"{part.upper()} of AutoAttack ({autoattack.VERSIONS[version]})",
        AUTOATTACK_PASSES[part] * AUTOATTACK_REPEATS.get(name, 1), AUTOATTACK_KINDS[version], norms=BOTH,
        min_classes=autoattack.LEAST_CLASSES.get(part, 2), obstacle_of=autoattack.square_obstacle if part == "square" else None,
    )  # fmt: skip


def run_through_gate(job: Job, name: str, stream: int) -> Tensor:
    """APGD on the targeted DLR through another gate, towards the 9 likeliest wrong classes. The hard gate decides what is
    misclassified."""
    networks = NetworkPair(lambda x: job.predict.forward_routed(x, make_gate(name))[0], judge=job.predict)
    return targeted_apgd(networks, job.x, job.y, Apgd(job.epsilon, 40), job.draws(stream))


def run_gama(job: Job) -> Tensor:
    """GAMA-PGD, 100 steps."""
    return gama(job.predict, job.x, job.y, job.epsilon, 100, job.draws(10))


def _surrogate(words: str, make: Callable[[Job], Surrogate], stream: int) -> Attack:
    return Attack(partial(run_surrogate, make=make, stream=stream), words, SURROGATE_PASSES, "route-aware", "routing")


def _reroute(words: str, beam: Beam, steps: int) -> Attack:
    """The entry of a rerouting attack. Its passes are counted for 16 layers of two experts."""
    # a forward pass; for each change a gradient, through half of the network on average, and a forward pass
    ranking = 1 / 3 + 16 / 3 + 16 / 3
    probes = 2 * beam.singles * (PROBE_STEPS + 1 / 3)
    passes = math.ceil(ranking + probes + beam.budget * (steps + 4 / 3))
    run = partial(run_reroute, beam=beam, steps=steps)
    return Attack(run, f"{words} over pathways, cheapest and weakest first", passes, "route-aware", "routing", version=2)


SURROGATES = {
    "straight_through_0.2": _surrogate("cross-entropy, straight-through gate, T = 0.2", gate("straight_through", 0.2), 0),
    "straight_through_1": _surrogate("cross-entropy, straight-through gate", gate("straight_through", 1.0), 1),
    "straight_through_5": _surrogate("cross-entropy, straight-through gate, T = 5", gate("straight_through", 5.0), 2),
    "soft_0.2": _surrogate("cross-entropy, soft gate, T = 0.2", gate("soft", 0.2), 3),
    "soft_1": _surrogate("cross-entropy, soft gate", gate("soft", 1.0), 4),
    "soft_5": _surrogate("cross-entropy, soft gate, T = 5", gate("soft", 5.0), 5),
    "margin_-1": _surrogate("cross-entropy minus the routers' margin", routing_margin(-1.0), 6),
    "margin_-0.1": _surrogate("cross-entropy minus 0.1 times the routers' margin", routing_margin(-0.1), 7),
    "margin_+0.1": _surrogate("cross-entropy plus 0.1 times the routers' margin", routing_margin(0.1), 8),
    "margin_+1": _surrogate("cross-entropy plus the routers' margin", routing_margin(1.0), 9),
    "held_route": _surrogate("the network with its route fixed to the clean one", held_route, 10),
    "second_route": _surrogate("the network with its route fixed to every router's second choice", second_route, 11),
    "straight_through_margin": _surrogate("the class margin, straight-through gate", gate("straight_through", 1.0, margin), 12),
}
ATTACKS: Entries[Attack] = Entries({
    **{f"pgd_{steps}": _pgd(steps) for steps in (10, 20, 50, 200)},
    "pgd_50x10": Attack(
        partial(run_pgd, steps=50, restarts=10), "PGD-50 from ten random starts", 504, "PGD", norms=BOTH, version=2
    ),
    "apgd_ce": _apgd("APGD on cross-entropy", cross_entropy, 1, 100),
    "apgd_dlr": _apgd("APGD on the difference of logits ratio", dlr, 2, 100),
    "apgd_scaled": _apgd("APGD on cross-entropy of scaled logits", scaled_cross_entropy, 7, 40),
    "apgd_margin_t": Attack(
        partial(run_targeted_apgd, objective=targeted_margin, stream=8, steps=25, targets=3),
        "APGD on the targeted margin, 25 steps for each of the 3 likeliest wrong classes", 79, "APGD", norms=BOTH,
    ),
    "apgd_t": Attack(
        partial(run_targeted_apgd, objective=targeted_dlr, stream=3),
        "APGD on the targeted DLR, 100 steps for each of the 9 likeliest wrong classes", 910, "APGD", norms=BOTH,
    ),
    "apgd_dlr_plus": Attack(
        partial(run_apgd, objective=dlr, stream=13, restarts=5),
        "APGD on the difference of logits ratio, 100 steps from five random starts", 506, "APGD", norms=BOTH,
    ),
    "apgd_t_plus": Attack(
        partial(run_targeted_apgd, objective=targeted_dlr, stream=14),
        "APGD on the targeted DLR, as apgd_t, from other random starts", 910, "APGD", norms=BOTH,
    ),
    **{name: _autoattack(name) for name in autoattack.STANDARD + autoattack.PLUS + autoattack.RAND},
    **SURROGATES,
    "reroute_quick": _reroute("a short search", Beam(2, 1, 1, 2), 20),
    "reroute": _reroute("a beam search", Beam(), 40),
    "reroute_full": _reroute("a wide beam search", Beam(12, 4, 3, 4), 60),
    "pma": _apgd("APGD on the probability margin", probability_margin, 9, 100),
    "gama": Attack(run_gama, "GAMA-PGD, the guided probability margin, 100 steps", 101, "APGD"),
    "apgd_t_straight_through": Attack(
        partial(run_through_gate, name="straight_through", stream=11),
        "APGD on the targeted DLR through the straight-through gate, 40 steps for each of the 9 likeliest wrong classes", 493,
        "route-aware", "routing",
    ),
    "apgd_t_soft": Attack(
        partial(run_through_gate, name="soft", stream=12),
        "APGD on the targeted DLR through the soft gate, 40 steps for each of the 9 likeliest wrong classes", 493,
        "route-aware", "routing",
    ),
    "paths": Attack(
        pathways.attack_pathways,
        "the network with its route fixed to every pathway up to a budget, else to some cheap and some random ones", 871,
        "route-aware", "routing", obstacle_of=pathways.obstacle, held=pathways.broken_on_a_pathway,
    ),
    "transfer": Attack(
        partial(run_surrogate, make=other_network, stream=99), "cross-entropy of another network", SURROGATE_PASSES, "transfer",
        "transfer",
    ),
})  # fmt: skip


def lookup_attack(name: str) -> Attack:
    """The entry of ATTACKS. Raises UserError if there is none, or if a user's entry is not an Attack that can run."""
    attack, what = lookup(ATTACKS, name, "attack"), f"attack '{name}'"
    check_kind(what, attack, Attack)
    check_accepts(f"{what}: run", attack.run, "job")
    if attack.needs not in get_args(Needs):
        raise UserError(f"{what}: needs must be '', routing or transfer, not {attack.needs}")
    if not isinstance(attack.norms, tuple) or not attack.norms or not set(attack.norms) <= set(get_args(Norm)):
        raise UserError(f"{what}: norms must be a tuple of {' and '.join(get_args(Norm))}, not {attack.norms!r}")
    return attack


def run_attack(name: str, job: Job, judge: nn.Module | None = None) -> Tensor:
    """x' [B, C, H, W] of the attack `name`, without a graph.

    Raises UserError if it returns anything else, or if it changes a network of the job, or the network `judge` that judges x': its
    weights, its buffers or its mode (train or eval); the networks are restored then. Whether x' is in the ball is not checked here.
    """
    networks = [network for network in (job.predict, job.transfer, judge) if isinstance(network, nn.Module)]
    states = [NetworkState(network) for network in dict.fromkeys(networks)]
    with torch.enable_grad():
        x_adv = ATTACKS[name].run(job)
    changes = [change for state in states if (change := state.undo(job.x[:1]))]
    if changes:
        raise UserError(f"attack '{name}' {changes[0]}")
    check_kind(f"attack '{name}': the result", x_adv, Tensor)
    if x_adv.shape != job.x.shape or x_adv.dtype != job.x.dtype:
        given, expected = (f"{str(x.dtype).removeprefix('torch.')}, {list(x.shape)}" for x in (x_adv, job.x))
        raise UserError(f"attack '{name}' must return images of {expected}, not of {given}")
    return x_adv.detach()

"""Routing figures compared with counts of one image at a time, on a small network whose layers differ in experts."""

from dataclasses import replace

import pytest
import torch
from toy_networks import ToyMoE, images, labels

from advmoe.attacks import Apgd, ImageDraws, Pgd, derive_seed, pgd, registry, targeted_apgd
from advmoe.attacks.objectives import targeted_margin
from advmoe.evaluation import evaluate, routing, shards
from advmoe.evaluation.results import paired
from advmoe.evaluation.routing import FIXED_ATTACK, routing_counts
from advmoe.evaluation.store import stored_shards
from advmoe.moe import HARD

EPSILON = 0.02
EXPERTS = (2, 3)


@pytest.fixture(scope="module")
def toy():
    return ToyMoE().eval()


def route_of(toy, z):
    """The expert of each layer for one image [1, 1, 6, 6], computed from the weights."""
    h, route = 2 * z.flatten() - 1, []
    for router, experts in zip(toy.routers, toy.experts, strict=True):
        route.append(int((router @ h).argmax()))
        h = (experts[route[-1]] @ h).tanh()
    return route


def logits_on_route(toy, z, route):
    """Logits [1, classes] on a given route, computed from the weights."""
    h = 2 * z.flatten() - 1
    for expert, experts in zip(route, toy.experts, strict=True):
        h = (experts[expert] @ h).tanh()
    return (toy.head @ h)[None]


@torch.no_grad()
def slow_figures(toy, x, y):
    correct = [row for row in range(len(x)) if toy(x[row : row + 1]).argmax() == y[row]]
    count = {"router": 0, "expert": 0, "flipped": 0, "overlap": [0, 0]}
    load, load_adv = ([[0] * experts for experts in EXPERTS] for _ in range(2))
    fixed, robust, gains, losses = ([0] * 3 for _ in range(4))
    kept: list[set[int]] = [set() for _ in range(3)]
    for row in range(len(x)):
        z, label = x[row : row + 1], y[row : row + 1]
        noise = ImageDraws(derive_seed(0, 0), [row])
        z_adv = pgd(toy, z, label, Pgd(EPSILON, EPSILON / 4, 50), noise)
        clean, adversarial = route_of(toy, z), route_of(toy, z_adv)
        for layer in range(2):
            load[layer][clean[layer]] += 1
            load_adv[layer][adversarial[layer]] += 1
        if row in correct:
            count["flipped"] += clean != adversarial
            count["overlap"] = [same + (a == b) for same, a, b in zip(count["overlap"], clean, adversarial, strict=True)]
            count["router"] += int(logits_on_route(toy, z, adversarial).argmax() == label)
            count["expert"] += int(logits_on_route(toy, z_adv, clean).argmax() == label)
        z_10 = pgd(toy, z, label, Pgd(EPSILON, EPSILON / 4, 10), ImageDraws(derive_seed(0, 0), [row]))
        routed = row in correct and bool(toy(z_10).argmax() == label)
        for expert in range(3):
            robust_on_route = False
            route = [min(expert, 1), expert]
            if logits_on_route(toy, z, route).argmax() == label:
                fixed[expert] += 1
                draws = ImageDraws(derive_seed(0, 6, expert), [row])
                z_fix = pgd(lambda p, r=route: logits_on_route(toy, p, r), z, label, Pgd(EPSILON, EPSILON / 4, 10), draws)
                robust_on_route = bool(logits_on_route(toy, z_fix, route).argmax() == label)
            if robust_on_route:
                settings, draws = Apgd(EPSILON, 25, num_targets=3), ImageDraws(derive_seed(0, 8), [row])
                z_margin = targeted_apgd(
                    lambda p, r=route: logits_on_route(toy, p, r), z, label, settings, draws, objective=targeted_margin
                )
                if logits_on_route(toy, z_margin, route).argmax() == label:
                    kept[expert].add(row)
            robust[expert] += robust_on_route
            gains[expert] += routed and not robust_on_route
            losses[expert] += robust_on_route and not routed
    total, num_correct = len(x), len(correct)
    return {
        "ra_router": 100 * count["router"] / total, "ra_expert": 100 * count["expert"] / total,
        "flip_rate": 100 * count["flipped"] / num_correct, "overlap": [100 * same / num_correct for same in count["overlap"]],
        "load": load, "load_adv": load_adv,
        "fixed_expert_sa": [100 * number / total for number in fixed],
        "fixed_expert_ra": [100 * number / total for number in robust],
        "choice_gain": [100 * (gain - loss) / total for gain, loss in zip(gains, losses, strict=True)],
        "fixed_expert_ra_worst": [100 * len(rows) / total for rows in kept], "choice_gain_worst": [],
        "any_expert_ra_worst": 100 * len(set.union(*kept)) / total,
    }  # fmt: skip


@pytest.mark.parametrize("size", [16, 5])
def test_routing_figures_equal_slow_counts(toy, size):
    x = images(16)
    y = labels(toy, x)
    figures = evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_50",), shard_size=size).routing
    expected = slow_figures(toy, x, y)
    figures = figures.model_dump()
    assert all(gain["low"] < gain["value"] < gain["high"] for gain in figures["choice_gain"])
    figures["choice_gain"] = [gain["value"] for gain in figures["choice_gain"]]
    assert set(figures) == set(expected)
    assert expected["fixed_expert_ra_worst"] != expected["fixed_expert_ra"]
    for name, value in expected.items():
        assert figures[name] == (value if name.startswith("load") else pytest.approx(value)), name
    assert 0 < figures["flip_rate"] < 100
    assert figures["ra_router"] != figures["ra_expert"]


ATTACKS = ("apgd_margin_t", "reroute_quick")


def test_the_gain_by_choosing_an_expert_counts_the_attacks_of_later_evaluations(toy, tmp_path, monkeypatch):
    x = images(16)
    y = labels(toy, x)
    options = {"epsilon": EPSILON, "shard_size": 5}
    first = evaluate(toy, x, y, preset=("pgd_50",), store=tmp_path, **options).routing
    assert (first.choice_gain_worst, evaluate(toy, x, y, preset=("pgd_50", "apgd_ce"), **options).routing) == ([], first)
    monkeypatch.setattr(shards, "routing_counts", None)  # the rows of the first evaluation are used
    later = evaluate(toy, x, y, preset=ATTACKS, store=tmp_path, **options)
    robust = set(later.correct) - set(later.ever)
    assert 100 * len(robust) / len(x) == later.worst
    gains = later.routing.choice_gain_worst
    assert [gain.value for gain in gains] == pytest.approx([later.worst - ra for ra in first.fixed_expert_ra_worst])
    kept = {row for _, shard in stored_shards(tmp_path) for row in shard.routing.kept[0]}
    assert gains[0] == paired(len(robust - kept), len(kept - robust), len(x))


def test_the_gain_in_the_worst_case_needs_a_rerouting_attack_and_the_attack_on_the_fixed_expert(toy):
    x = images(4)
    y = labels(toy, x)
    for others in (("apgd_margin_t",), ("apgd_margin_t", "held_route", "straight_through_1"), ("apgd_ce", "reroute_quick")):
        assert evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_50", *others)).routing.choice_gain_worst == []
    assert len(evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_50", *ATTACKS)).routing.choice_gain_worst) == 3


@pytest.mark.parametrize("changed", ["counts", "pgd_50", FIXED_ATTACK])
def test_routing_counts_of_an_older_version_are_counted_again(toy, tmp_path, monkeypatch, changed):
    x = images(6)
    y = labels(toy, x)
    options = {"epsilon": EPSILON, "preset": ("pgd_50", *ATTACKS), "shard_size": 3, "store": tmp_path}
    fresh = evaluate(toy, x, y, **options).routing
    counted = []

    def count(*args):
        counted.append(args)
        return routing_counts(*args)

    monkeypatch.setattr(shards, "routing_counts", count)
    assert (evaluate(toy, x, y, **options).routing, counted) == (fresh, [])
    if changed == "counts":
        monkeypatch.setattr(routing, "VERSION", 99)
    else:
        monkeypatch.setitem(registry.ATTACKS, changed, replace(registry.ATTACKS[changed], version=99))
    assert evaluate(toy, x, y, **{**options, "preset": ("pgd_10",)}).routing is None
    assert evaluate(toy, x, y, **options).routing == fresh
    assert len(counted) == 2


def test_paired_interval_by_hand():
    """15 gained, 5 lost of 100: 10 points; with half an image more in each cell (15.5 - 5.5) / 102 -+ 1.96 * 4.47 / 102."""
    interval = paired(15, 5, 100)
    assert interval.value == pytest.approx(10)
    assert (interval.low, interval.high) == pytest.approx((1.206, 18.401), abs=1e-3)


def test_the_batch_size_changes_no_count(toy):
    x = images(16)
    y = labels(toy, x)
    full_batch, small_batches = (
        evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_10", "pgd_50", "straight_through_1"), batch_size=size) for size in (16, 3)
    )
    assert small_batches.routing == full_batch.routing
    assert small_batches.broken == full_batch.broken


class OtherInLowPrecision(ToyMoE):
    """Under autocast it predicts other classes, so attacks on it leave images that fool only the faster copy."""

    def forward_routed(self, x, gate=HARD):
        logits, routings = super().forward_routed(x, gate)
        return logits.roll(1, dims=1) if torch.is_autocast_enabled("cpu") else logits, routings


def test_the_gain_by_choosing_an_expert_is_that_of_the_ra_10_of_the_figures():
    model, x = OtherInLowPrecision().eval(), images(16)
    evaluation = evaluate(model, x, labels(model, x), epsilon=EPSILON, preset=("pgd_10", "pgd_50"), bf16_search=True)
    gains, robust = evaluation.routing.choice_gain, evaluation.routing.fixed_expert_ra
    assert [gain.value for gain in gains] == pytest.approx([evaluation.figures["ra_10"] - ra for ra in robust])


def test_without_pgd_50_there_is_no_routing_section(toy):
    x = images(4)
    assert evaluate(toy, x, labels(toy, x), epsilon=EPSILON, preset=("pgd_10",)).routing is None

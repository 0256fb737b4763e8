"""Routing figures compared with counts of one image at a time, on a small network whose layers differ in experts."""

import pytest
import torch
from toy_networks import ToyMoE, images, labels

from advmoe.attacks import ImageDraws, Pgd, derive_seed, pgd
from advmoe.evaluation import evaluate
from advmoe.evaluation.results import paired

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
    for name, value in expected.items():
        assert figures[name] == (value if name.startswith("load") else pytest.approx(value)), name
    assert 0 < figures["flip_rate"] < 100
    assert figures["ra_router"] != figures["ra_expert"]


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


def test_without_pgd_50_there_is_no_routing_section(toy):
    x = images(4)
    assert evaluate(toy, x, labels(toy, x), epsilon=EPSILON, preset=("pgd_10",)).routing is None

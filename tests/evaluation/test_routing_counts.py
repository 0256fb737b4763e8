"""Routing figures against one image at a time, by hand, on a hand-made network whose layers differ in experts."""

import pytest
import torch
from toys import Toy, images, labels

from advmoe.attacks import ImageDraws, Pgd, derive_seed, pgd
from advmoe.evaluation import evaluate
from advmoe.evaluation.results import paired

EPSILON = 0.02
EXPERTS = (2, 3)


@pytest.fixture(scope="module")
def toy():
    return Toy().eval()


def route_of(toy, z):
    """By the weights: which expert each layer takes for one image [1, 1, 6, 6]."""
    h, route = 2 * z.flatten() - 1, []
    for router, experts in zip(toy.routers, toy.experts, strict=True):
        route.append(int((router @ h).argmax()))
        h = (experts[route[-1]] @ h).tanh()
    return route


def answer(toy, z, route):
    """Logits [1, classes] on a given route, by the weights."""
    h = 2 * z.flatten() - 1
    for expert, experts in zip(route, toy.experts, strict=True):
        h = (experts[expert] @ h).tanh()
    return (toy.head @ h)[None]


@torch.no_grad()
def slow(toy, x, y):
    correct = [row for row in range(len(x)) if toy(x[row : row + 1]).argmax() == y[row]]
    count = {"router": 0, "expert": 0, "flipped": 0, "overlap": [0, 0]}
    load, load_adv = ([[0] * experts for experts in EXPERTS] for _ in range(2))
    fixed, robust, gained, lost = ([0] * 3 for _ in range(4))
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
            count["overlap"] = [n + (a == b) for n, a, b in zip(count["overlap"], clean, adversarial, strict=True)]
            count["router"] += int(answer(toy, z, adversarial).argmax() == label)
            count["expert"] += int(answer(toy, z_adv, clean).argmax() == label)
        z_10 = pgd(toy, z, label, Pgd(EPSILON, EPSILON / 4, 10), ImageDraws(derive_seed(0, 0), [row]))
        routed = row in correct and bool(toy(z_10).argmax() == label)
        for expert in range(3):
            held = False
            route = [min(expert, 1), expert]
            if answer(toy, z, route).argmax() == label:
                fixed[expert] += 1
                draws = ImageDraws(derive_seed(0, 6, expert), [row])
                z_fix = pgd(lambda p, r=route: answer(toy, p, r), z, label, Pgd(EPSILON, EPSILON / 4, 10), draws)
                held = bool(answer(toy, z_fix, route).argmax() == label)
            robust[expert] += held
            gained[expert] += routed and not held
            lost[expert] += held and not routed
    n, right = len(x), len(correct)
    return {
        "ra_router": 100 * count["router"] / n, "ra_expert": 100 * count["expert"] / n,
        "flip_rate": 100 * count["flipped"] / right, "overlap": [100 * kept / right for kept in count["overlap"]],
        "load": load, "load_adv": load_adv,
        "fixed_expert_sa": [100 * hits / n for hits in fixed], "fixed_expert_ra": [100 * hits / n for hits in robust],
        "choice_gain": [100 * (more - less) / n for more, less in zip(gained, lost, strict=True)],
    }  # fmt: skip


@pytest.mark.parametrize("size", [16, 5])
def test_routing_figures_are_the_slow_ones(toy, size):
    x = images(16)
    y = labels(toy, x)
    found = evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_50",), shard_size=size).routing
    wanted = slow(toy, x, y)
    found = found.model_dump()
    assert all(gain["low"] < gain["value"] < gain["high"] for gain in found["choice_gain"])
    found["choice_gain"] = [gain["value"] for gain in found["choice_gain"]]
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name] == (value if name.startswith("load") else pytest.approx(value)), name
    assert 0 < found["flip_rate"] < 100
    assert found["ra_router"] != found["ra_expert"]


def test_paired_interval_by_hand():
    """15 gained, 5 lost of 100: 10 points; with half an image more in each cell (15.5 - 5.5) / 102 -+ 1.96 * 4.47 / 102."""
    found = paired(15, 5, 100)
    assert found.value == pytest.approx(10)
    assert (found.low, found.high) == pytest.approx((1.206, 18.401), abs=1e-3)


def test_batches_change_no_count(toy):
    x = images(16)
    y = labels(toy, x)
    whole, parts = (
        evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_10", "pgd_50", "straight_through_1"), batch_size=size) for size in (16, 3)
    )
    assert parts.routing == whole.routing
    assert parts.broken == whole.broken


def test_without_pgd_50_there_is_no_routing_section(toy):
    x = images(4)
    assert evaluate(toy, x, labels(toy, x), epsilon=EPSILON, preset=("pgd_10",)).routing is None

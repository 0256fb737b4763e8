"""The attack that changes routes: what it finds where AutoAttack does not, and that it keeps its promises."""

import sys
from pathlib import Path

import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from advmoe.attacks import Apgd, ImageDraws, apgd, frozen, targeted_apgd
from advmoe.attacks.job import Job
from advmoe.attacks.registry import ATTACKS
from advmoe.attacks.rerouting import PROBE_STEPS, Beam, cheapest_changes, in_turn, reroute, weakest_changes
from advmoe.attacks.surrogate import Search
from advmoe.moe import HARD, Gate, Routing

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))
from planted import EPSILON, Planted, images, planted

CLASSES, SIDE = 3, 4


class Linear(nn.Module):
    """Images [B, 1, 4, 4]; for each entry of `experts` a linear router over so many linear experts, whose outputs add up.

    `passes` counts the forward passes that were made of every image.
    """

    def __init__(self, *experts: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.sizes, self.passes = experts, 0
        self.routers = nn.ModuleList(nn.Linear(SIDE * SIDE, count) for count in experts)
        self.experts = nn.ModuleList(nn.Linear(SIDE * SIDE, count * CLASSES) for count in experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        flat, routings = x.flatten(1), []
        self.passes += 1
        total = torch.zeros(len(x), CLASSES)
        for layer, count in enumerate(self.sizes):
            logits = self.routers[layer](flat)
            chosen = gate.weights(logits, layer).experts
            outputs = self.experts[layer](flat).unflatten(1, (count, CLASSES))
            total = total + outputs[torch.arange(len(x)), chosen]
            routings.append(Routing(logits, chosen))
        return total, routings


class Hidden(Linear):
    """Two experts that ignore the image: only the other route, which no gradient of the loss shows, changes the class."""

    def __init__(self, distance: float) -> None:
        super().__init__(2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.routers[0].weight[1] = 1 / (SIDE * SIDE)  # the mean pixel
            self.routers[0].bias[0] = 0.5 + distance
            self.experts[0].bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]))


def noise_images(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def attack(
    model: Linear, x: Tensor, epsilon: float = 0.1, steps: int = 10, beam: Beam | None = None, rows: list[int] | None = None
) -> Tensor:
    rows = list(range(len(x))) if rows is None else rows
    with frozen(model):
        y = model(x).argmax(dim=1)
        model.passes = 0
        return reroute(model, x, y, Search(epsilon, steps), beam or Beam(), ImageDraws(2, rows))


# the order of the changes


def hand_made(weights: list[list[float]], biases: list[float]) -> Linear:
    """One layer whose router sees the first two pixels alone."""
    model = Linear(len(biases))
    with torch.no_grad():
        model.routers[0].weight.zero_()
        model.routers[0].weight[:, :2] = torch.tensor(weights)
        model.routers[0].bias.copy_(torch.tensor(biases))
    return model


def test_changes_stand_in_the_order_of_their_distance() -> None:
    """At pixels (0.5, 0.5) the logits are 2.0, 1.5, 1.0, 1.9: gaps 0.5, 1.0 and 0.1 to the top one.

    Gradients of the gaps: (1, 1), L1 2: distance 0.25; (5, 5), L1 10: 0.1; (0.1, 0.1), L1 0.2: 0.5. So the smallest gap
    comes last: its router hardly moves.
    """
    model = hand_made([[1.0, 1.0], [0.0, 0.0], [-4.0, -4.0], [0.9, 0.9]], [1.0, 1.5, 5.0, 1.0])
    x = torch.full((2, 1, SIDE, SIDE), 0.5)
    assert torch.allclose(model.forward_routed(x)[1][0].logits[0], torch.tensor([2.0, 1.5, 1.0, 1.9]))
    assert cheapest_changes(model, x).tolist() == [[[0, 2], [0, 1], [0, 3]]] * 2


def test_changes_of_several_layers_are_ordered_together_and_single_experts_skipped() -> None:
    near, far = hand_made([[1.0, 0.0], [0.0, 0.0]], [0.1, 0.0]), hand_made([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]], [1.0, 0.0, 0.0])
    model = Linear(3, 1, 2)
    model.routers[0], model.routers[2] = far.routers[0], near.routers[0]
    x = torch.full((1, 1, SIDE, SIDE), 0.5)
    # layer 0: logits 1.5, 0, 1 (gap 0.5 over |1 - 2| = 0.5; gap 1.5 over 1 = 1.5); layer 2: 0.6, 0 (gap 0.6 over 1 = 0.6)
    assert cheapest_changes(model, x).tolist() == [[[0, 2], [2, 1], [0, 1]]]


def test_a_router_without_gradient_comes_last() -> None:
    model = hand_made([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [1.0, 0.9, -5.0])
    x = torch.full((1, 1, SIDE, SIDE), 0.5)
    assert cheapest_changes(model, x).tolist() == [[[0, 2], [0, 1]]]  # gap 0.1 of slope 0 against gap 6.5 of slope 1


@pytest.mark.parametrize("fault", ["cut", "nan"])
def test_a_router_that_is_cut_or_gives_nan_does_not_stop_the_attack(fault: str) -> None:
    class Faulty(Linear):
        def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
            logits, routings = super().forward_routed(x, gate)
            spoilt = [routing.logits.detach() if fault == "cut" else routing.logits * torch.nan for routing in routings]
            return logits, [Routing(bad, routing.experts) for bad, routing in zip(spoilt, routings, strict=True)]

    model, x = Faulty(3, 2), noise_images(8)
    changes = cheapest_changes(model, x)
    assert changes.shape == (8, 3, 2)
    x_adv = attack(model, x)
    assert torch.isfinite(x_adv).all()
    assert (x_adv - x).abs().max() <= 0.1 + 1e-7


@pytest.mark.parametrize("sizes", [(1,), (1, 1)])
def test_a_network_with_nothing_to_choose_has_no_changes(sizes: tuple[int, ...]) -> None:
    model, x = Linear(*sizes), noise_images(3)
    assert cheapest_changes(model, x).shape == (3, 0, 2)
    assert torch.equal(attack(model, x), x)


# the budget


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (4, 1, 3), (2, 2, 2, 2, 2)])
@pytest.mark.parametrize("beam", [Beam(), Beam(2, 1, 1, 2), Beam(1, 1, 1, 1), Beam(5, 3, 2, 4)])
def test_never_makes_more_passes_than_its_budget(sizes: tuple[int, ...], beam: Beam) -> None:
    model = Linear(*sizes)
    with torch.no_grad():  # nothing can be fooled, so nothing ends early
        for expert in model.experts:
            expert.weight.zero_()
            expert.bias.zero_()
            expert.bias[::CLASSES] = 1.0
    attack(model, noise_images(5), steps=7, beam=beam)
    changes = sum(number - 1 for number in sizes)
    order = changes + min(2 * beam.singles, changes) * (PROBE_STEPS + 1)
    assert model.passes <= beam.budget * (7 + 2) + order + 3  # two looks more than steps for each ascent; the orders; the layers


def test_the_budget_does_not_grow_with_the_pathways() -> None:
    assert Beam(4, 2, 2, 3).budget == 4 + 2 * 2 * 2
    assert Beam(1, 1, 1, 1).budget == 1


@pytest.fixture
def both() -> Linear:
    """Only both layers on their second expert give class 1: no single change does. The second layer's brings it nearer."""
    model = Linear(2, 2)
    with torch.no_grad():
        for layer in range(2):
            for parameter in (model.routers[layer].weight, model.routers[layer].bias, model.experts[layer].weight):
                parameter.zero_()
            model.routers[layer].weight[1, layer] = 1.0  # pixel number `layer`
            model.routers[layer].bias[0] = 0.595
            model.experts[layer].bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.9 + 0.05 * layer, 0.0]))
    return model


@pytest.mark.parametrize("beam", [Beam(), Beam(singles=2, width=1, branches=1, depth=2)])
def test_the_beam_combines_changes(both: Linear, beam: Beam) -> None:
    x = torch.full((4, 1, SIDE, SIDE), 0.5)
    assert (both(attack(both, x, beam=Beam(depth=1))).argmax(dim=1) == 0).all()
    assert (both(attack(both, x, beam=beam)).argmax(dim=1) == 1).all()


# success


def test_finds_the_class_that_only_another_route_gives() -> None:
    model, x = Hidden(0.05), torch.full((6, 1, SIDE, SIDE), 0.5)
    assert (model(x).argmax(dim=1) == 0).all()
    assert (model(attack(model, x)).argmax(dim=1) == 1).all()


def test_does_not_leave_the_ball_to_find_it() -> None:
    model, x = Hidden(0.15), torch.full((6, 1, SIDE, SIDE), 0.5)
    x_adv = attack(model, x)
    assert (model(x_adv).argmax(dim=1) == 0).all()
    assert torch.equal(x_adv, x)  # nothing was found


@pytest.mark.parametrize("sizes", [(4,), (3, 1), (2, 2, 2)])
def test_what_it_gives_back_is_the_image_or_fools_the_true_network_inside_the_ball(sizes: tuple[int, ...]) -> None:
    model, x = Linear(*sizes), noise_images(64).mul(1.4).sub(0.2).clamp(0, 1)  # with saturated pixels
    y, x_adv = model(x).argmax(dim=1), attack(model, x)
    changed = (x_adv != x).flatten(1).any(dim=1)
    assert torch.equal(model(x_adv).argmax(dim=1) != y, changed)
    assert 5 < changed.sum() < 64
    assert (x_adv - x).abs().max() <= 0.1 + 1e-7
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize("sizes", [(4,), (2, 3)])
def test_a_image_does_not_depend_on_who_shares_its_batch(sizes: tuple[int, ...]) -> None:
    model, x = Linear(*sizes), noise_images(12)
    whole = attack(model, x)
    for rows in ([0, 1, 2], [7], [11, 3, 8, 5]):
        assert torch.allclose(attack(model, x[rows], rows=rows), whole[rows], atol=1e-6)


def test_attempts_that_run_together_fool_the_same_images() -> None:
    model, x = Linear(2, 3), noise_images(24)
    with frozen(model):
        y = model(x).argmax(dim=1)
        results = [reroute(model, x, y, Search(0.05, 10, size), Beam(), ImageDraws(2, range(24))) for size in (1, 24, 60, 1000)]
    fooled = [(model(x_adv).argmax(dim=1) != y).tolist() for x_adv in results]
    assert all(flags == fooled[0] for flags in fooled)
    assert 0 < sum(fooled[0]) < 24


def test_same_seed_same_points() -> None:
    model, x = Linear(4), noise_images(8)
    assert torch.equal(attack(model, x), attack(model, x))


# against AutoAttack, on a trained network with one hard router


def left_by_reroute(model: Planted, x: Tensor, y: Tensor, rows: list[int]) -> int:
    """How many of `rows` the preset's attack leaves."""
    with frozen(model):
        x_adv = ATTACKS["reroute"].run(Job(model, x[rows], y[rows], rows, EPSILON, "Linf", 0, 0, 10))
        assert (x_adv - x[rows]).abs().max() <= EPSILON + 1e-6
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        return int((model(x_adv).argmax(dim=1) == y[rows]).sum())


def test_leaves_at_most_60_percent_of_what_apgd_leaves() -> None:
    """The claim below in small: one seed, fewer images, and our APGD on two losses in AutoAttack's place."""
    model, test = planted(0, epochs=2, count=3000, steps=2), images().test
    x, y = test.pixels()[:40], test.labels[:40]
    with frozen(model):
        stands = model(x).argmax(dim=1) == y
        stands &= model(apgd(model, x, y, Apgd(EPSILON), ImageDraws(0, range(40)))).argmax(dim=1) == y
        x_adv = targeted_apgd(model, x, y, Apgd(EPSILON, num_steps=40), ImageDraws(1, range(40)))
        rows = (stands & (model(x_adv).argmax(dim=1) == y)).nonzero()[:, 0].tolist()
    assert len(rows) >= 12
    assert left_by_reroute(model, x, y, rows) <= 0.6 * len(rows)


@pytest.mark.slow
def test_leaves_at_most_60_percent_of_what_autoattack_leaves() -> None:
    """Three seeds, 64 images each, standard AutoAttack by the official package."""
    test, before, after = images().test, 0, 0
    x, y = test.pixels()[:64], test.labels[:64]
    for seed in range(3):
        model = planted(seed)
        with frozen(model):
            suite = AutoAttack(model, norm="Linf", eps=EPSILON, version="standard", device="cpu", seed=seed)
            x_adv, _ = suite.run_standard_evaluation(x, y, batch_size=64)
            rows = (model(x_adv).argmax(dim=1) == y).nonzero()[:, 0].tolist()
        before += len(rows)
        after += left_by_reroute(model, x, y, rows)
    print(f"AutoAttack leaves {before}, reroute {after}")
    assert before >= 60  # a third of the images: the network is robust as far as AutoAttack sees
    assert after <= 0.6 * before


class DearAndFatal(Linear):
    """Six experts that ignore the image. Expert 0 is taken; 1 to 4 are cheap to reach and agree with it; 5 is dearer and errs."""

    def __init__(self) -> None:
        super().__init__(6)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.routers[0].weight[1:] = 1 / (SIDE * SIDE)  # the mean pixel
            self.routers[0].bias.copy_(torch.tensor([0.5, -0.01, -0.02, -0.03, -0.04, -0.045]))
            for expert in range(1, 6):
                self.routers[0].weight[expert, expert] += 0.5  # a pixel of its own, so that each can be reached
                self.routers[0].bias[expert] -= 0.25
            self.experts[0].bias.copy_(torch.tensor([1.0, 0.0, 0.0] * 5 + [0.0, 1.0, 0.0]))


def test_a_dear_reroute_that_is_fatal_is_found_before_cheap_ones_that_are_harmless() -> None:
    model, x = DearAndFatal(), torch.full((3, 1, SIDE, SIDE), 0.5)
    y = torch.zeros(3, dtype=torch.long)
    cheap = cheapest_changes(model, x)
    assert cheap[0, :, 1].tolist() == [1, 2, 3, 4, 5]
    assert weakest_changes(model, x, y, cheap, 0.1, 4)[0, 0].tolist() == [0, 5]
    x_adv = attack(model, x, beam=Beam(2, 1, 1, 1))
    assert (model(x_adv).argmax(dim=1) == 1).all()


def test_two_orders_take_turns_and_name_every_change_once() -> None:
    first = torch.tensor([[[0, 1], [0, 2], [1, 1], [2, 1]]])
    second = torch.tensor([[[2, 1], [0, 1], [1, 1], [0, 2]]])
    assert in_turn(first, second)[0].tolist() == [[0, 1], [2, 1], [0, 2], [1, 1]]

"""The attack that changes routes: it stays in the ball and in its budget, and fools where AutoAttack does not."""

import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from advmoe.attacks import Apgd, ImageDraws, apgd, frozen, targeted_apgd
from advmoe.attacks.job import Job
from advmoe.attacks.registry import ATTACKS
from advmoe.attacks.rerouting import PROBE_STEPS, Beam, cheapest_changes, in_turn, reroute, weakest_changes
from advmoe.attacks.surrogate import Search
from advmoe.benchmark.planted import EPSILON, Planted, images, planted
from advmoe.moe import HARD, Gate, Routing

CLASSES, SIDE = 3, 4


class Linear(nn.Module):
    """Images [B, 1, 4, 4]. Each entry of `experts` makes a layer: a linear router over that many linear experts. The layers'
    outputs are added.

    `passes` counts the forward passes of each image.
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
    """Two experts that ignore the image: only the other route changes the class, and no gradient of the loss leads there."""

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
    """One layer whose router reads only the first two pixels."""
    model = Linear(len(biases))
    with torch.no_grad():
        model.routers[0].weight.zero_()
        model.routers[0].weight[:, :2] = torch.tensor(weights)
        model.routers[0].bias.copy_(torch.tensor(biases))
    return model


def test_changes_are_ordered_by_distance() -> None:
    """At pixels (0.5, 0.5) the logits are 2.0, 1.5, 1.0, 1.9: gaps 0.5, 1.0 and 0.1 to the top one.

    Gradients of the gaps: (1, 1), L1 2: distance 0.25; (5, 5), L1 10: 0.1; (0.1, 0.1), L1 0.2: 0.5. The smallest gap
    comes last, because its gradient is small.
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
            faulty_logits = [routing.logits.detach() if fault == "cut" else routing.logits * torch.nan for routing in routings]
            return logits, [
                Routing(router_logits, routing.experts) for router_logits, routing in zip(faulty_logits, routings, strict=True)
            ]

    model, x = Faulty(3, 2), noise_images(8)
    changes = cheapest_changes(model, x)
    assert changes.shape == (8, 3, 2)
    x_adv = attack(model, x)
    assert torch.isfinite(x_adv).all()
    assert (x_adv - x).abs().max() <= 0.1 + 1e-7


@pytest.mark.parametrize("sizes", [(1,), (1, 1)])
def test_a_network_with_one_expert_in_each_layer_has_no_changes(sizes: tuple[int, ...]) -> None:
    model, x = Linear(*sizes), noise_images(3)
    assert cheapest_changes(model, x).shape == (3, 0, 2)
    assert torch.equal(attack(model, x), x)


# the budget


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (4, 1, 3), (2, 2, 2, 2, 2)])
@pytest.mark.parametrize("beam", [Beam(), Beam(2, 1, 1, 2), Beam(1, 1, 1, 1), Beam(5, 3, 2, 4)])
def test_never_makes_more_passes_than_its_budget(sizes: tuple[int, ...], beam: Beam) -> None:
    model = Linear(*sizes)
    with torch.no_grad():  # no image can be fooled, so the attack does not end early
        for expert in model.experts:
            expert.weight.zero_()
            expert.bias.zero_()
            expert.bias[::CLASSES] = 1.0
    attack(model, noise_images(5), steps=7, beam=beam)
    changes = sum(number - 1 for number in sizes)
    order = changes + min(2 * beam.singles, changes) * (PROBE_STEPS + 1)
    assert (
        model.passes <= beam.budget * (7 + 2) + order + 3
    )  # each ascent looks twice more than it steps; then the two orders, and the layers


def test_the_budget_does_not_grow_with_the_pathways() -> None:
    assert Beam(4, 2, 2, 3).budget == 4 + 2 * 2 * 2
    assert Beam(1, 1, 1, 1).budget == 1


@pytest.fixture
def both() -> Linear:
    """Class 1 only if both layers use their second expert. Of the single changes, the second layer's comes closer."""
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


def test_fools_a_network_that_only_another_route_fools() -> None:
    model, x = Hidden(0.05), torch.full((6, 1, SIDE, SIDE), 0.5)
    assert (model(x).argmax(dim=1) == 0).all()
    assert (model(attack(model, x)).argmax(dim=1) == 1).all()


def test_does_not_leave_the_ball() -> None:
    model, x = Hidden(0.15), torch.full((6, 1, SIDE, SIDE), 0.5)
    x_adv = attack(model, x)
    assert (model(x_adv).argmax(dim=1) == 0).all()
    assert torch.equal(x_adv, x)


@pytest.mark.parametrize("sizes", [(4,), (3, 1), (2, 2, 2)])
def test_the_result_is_the_image_or_a_point_in_the_ball_that_fools_the_network(sizes: tuple[int, ...]) -> None:
    model, x = Linear(*sizes), noise_images(64).mul(1.4).sub(0.2).clamp(0, 1)  # with saturated pixels
    y, x_adv = model(x).argmax(dim=1), attack(model, x)
    changed = (x_adv != x).flatten(1).any(dim=1)
    assert torch.equal(model(x_adv).argmax(dim=1) != y, changed)
    assert 5 < changed.sum() < 64
    assert (x_adv - x).abs().max() <= 0.1 + 1e-7
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize("sizes", [(4,), (2, 3)])
def test_an_images_result_does_not_depend_on_its_batch(sizes: tuple[int, ...]) -> None:
    model, x = Linear(*sizes), noise_images(12)
    full_batch = attack(model, x)
    for rows in ([0, 1, 2], [7], [11, 3, 8, 5]):
        assert torch.allclose(attack(model, x[rows], rows=rows), full_batch[rows], atol=1e-6)


def test_attempts_in_one_batch_fool_the_same_images() -> None:
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


def robust_to_reroute(model: Planted, x: Tensor, y: Tensor, rows: list[int]) -> int:
    """The number of `rows` that are robust to the attack `reroute`."""
    with frozen(model):
        x_adv = ATTACKS["reroute"].run(Job(model, x[rows], y[rows], rows, EPSILON, "Linf", 0, 0, 10))
        assert (x_adv - x[rows]).abs().max() <= EPSILON + 1e-6
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        return int((model(x_adv).argmax(dim=1) == y[rows]).sum())


def test_leaves_at_most_60_percent_of_what_apgd_leaves() -> None:
    """A fast form of the next test: one seed, fewer images, and our APGD with two losses instead of AutoAttack."""
    model, test = planted(0, epochs=2, count=1500, steps=1), images().test
    x, y = test.pixels()[:40], test.labels[:40]
    with frozen(model):
        robust = model(x).argmax(dim=1) == y
        robust &= model(apgd(model, x, y, Apgd(EPSILON), ImageDraws(0, range(40)))).argmax(dim=1) == y
        x_adv = targeted_apgd(model, x, y, Apgd(EPSILON, num_steps=40), ImageDraws(1, range(40)))
        rows = (robust & (model(x_adv).argmax(dim=1) == y)).nonzero()[:, 0].tolist()
    assert len(rows) >= 12
    assert robust_to_reroute(model, x, y, rows) <= 0.6 * len(rows)


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
        after += robust_to_reroute(model, x, y, rows)
    print(f"AutoAttack leaves {before}, reroute {after}")
    assert before >= 60  # a third of the images: AutoAttack reports a robust network
    assert after <= 0.6 * before


class FarAndWrong(Linear):
    """Six experts that ignore the image. Expert 0 is chosen. Experts 1 to 4 are close and agree with it; 5 is farther and wrong."""

    def __init__(self) -> None:
        super().__init__(6)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.routers[0].weight[1:] = 1 / (SIDE * SIDE)  # the mean pixel
            self.routers[0].bias.copy_(torch.tensor([0.5, -0.01, -0.02, -0.03, -0.04, -0.045]))
            for expert in range(1, 6):
                self.routers[0].weight[expert, expert] += 0.5  # a different pixel for each expert, so that each can be reached
                self.routers[0].bias[expert] -= 0.25
            self.experts[0].bias.copy_(torch.tensor([1.0, 0.0, 0.0] * 5 + [0.0, 1.0, 0.0]))


def test_a_far_change_that_fools_is_tried_before_close_ones_that_do_not() -> None:
    model, x = FarAndWrong(), torch.full((3, 1, SIDE, SIDE), 0.5)
    y = torch.zeros(3, dtype=torch.long)
    changes = cheapest_changes(model, x)
    assert changes[0, :, 1].tolist() == [1, 2, 3, 4, 5]
    assert weakest_changes(model, x, y, changes, 0.1, 4)[0, 0].tolist() == [0, 5]
    x_adv = attack(model, x, beam=Beam(2, 1, 1, 1))
    assert (model(x_adv).argmax(dim=1) == 1).all()


def test_two_orders_alternate_and_contain_every_change_once() -> None:
    first = torch.tensor([[[0, 1], [0, 2], [1, 1], [2, 1]]])
    second = torch.tensor([[[2, 1], [0, 1], [1, 1], [0, 2]]])
    assert in_turn(first, second)[0].tolist() == [[0, 1], [2, 1], [0, 2], [1, 1]]

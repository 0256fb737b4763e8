"""Planted faults that raise the measured robust accuracy: each must be flagged, and the sound network must not be."""

from collections.abc import Callable

import pytest
import torch
from planted import (
    CutInput,
    CutLogits,
    NanNetwork,
    NanRouter,
    NoisyLogits,
    SoftmaxOutputs,
    StochasticGate,
    ThousandfoldLogits,
    UnsettledTies,
    clamp_in_graph,
    clamp_outside_graph,
    train_clean,
    with_fault,
)
from torch import Tensor, nn

from advmoe.attacks import Pgd
from advmoe.benchmark.planted import EPSILON, Planted, images, planted
from advmoe.errors import UserError
from advmoe.evaluation import Evaluation, attack_strength, evaluate

NUMBERED = {1: "same image, same answer", 2: "logits, not softmax", 3: "gradients are there"}


@pytest.fixture(scope="module")
def sound() -> Planted:
    """Trained for a short time, which is enough for these checks."""
    return planted(0, epochs=2, count=1500, steps=1)


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    test = images().test
    return test.pixels()[:48], test.labels[:48]


def status(evaluation: Evaluation, number: int) -> str:
    (check,) = [check for check in evaluation.checks if check.name == NUMBERED[number]]
    assert check.number == number
    return check.status


def run(model: nn.Module, data: tuple[Tensor, Tensor]) -> Evaluation:
    torch.manual_seed(0)  # for the faults that draw random numbers
    return evaluate(model, *data, epsilon=EPSILON, preset=["pgd_10"])


def test_the_sound_network_passes(sound: Planted, data: tuple[Tensor, Tensor]) -> None:
    evaluation = run(sound, data)
    assert {number: status(evaluation, number) for number in NUMBERED} == dict.fromkeys(NUMBERED, "pass")


@pytest.mark.parametrize(
    ("fault", "number"),
    [
        (CutLogits, 3),
        (CutInput, 3),
        (ThousandfoldLogits, 3),
        (StochasticGate, 1),
        (NoisyLogits, 1),
        (UnsettledTies, 1),
        (NanRouter, 3),
        (SoftmaxOutputs, 2),
    ],
)
def test_a_planted_fault_is_flagged(fault: type[Planted], number: int, sound: Planted, data: tuple[Tensor, Tensor]) -> None:
    assert status(run(with_fault(sound, fault), data), number) == "fail"


@pytest.mark.parametrize("fault", [CutLogits, CutInput])
def test_a_cut_router_is_flagged_by_the_routers_gradient_alone(
    fault: type[Planted], sound: Planted, data: tuple[Tensor, Tensor]
) -> None:
    """The network's logits and the gradient of its loss do not change, so no other figure shows the fault."""
    faulty, reference = run(with_fault(sound, fault), data), run(sound, data)
    assert faulty.figures == reference.figures
    (check,) = [check for check in faulty.checks if check.number == 3]
    assert "loss, start 0.0 %" in check.detail
    assert "routers, start 100.0 %" in check.detail
    assert "routers, mid-attack 100.0 %" in check.detail


ROUTE_AWARE = ["pgd_10", "straight_through_1", "soft_1", "margin_-1", "margin_+1", "held_route", "second_route", "reroute_quick"]


@pytest.mark.parametrize(("fault", "number"), [(CutLogits, 3), (CutInput, 3), (NanRouter, 3), (StochasticGate, 1)])
def test_route_aware_attacks_run_on_a_faulty_network(
    fault: type[Planted], number: int, sound: Planted, data: tuple[Tensor, Tensor]
) -> None:
    """Without a finite gradient they must neither crash nor return invalid images."""
    torch.manual_seed(0)
    evaluation = evaluate(with_fault(sound, fault), data[0][:5], data[1][:5], epsilon=EPSILON, preset=ROUTE_AWARE)
    assert set(evaluation.attacks) == set(ROUTE_AWARE)
    assert status(evaluation, number) == "fail"
    assert [check.status for check in evaluation.checks if check.number == 11] == ["pass"]


def test_class_logits_of_nan_are_refused(sound: Planted, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(UserError, match="NaN"):
        run(with_fault(sound, NanNetwork), data)


# gradients through the clamp

SETTINGS = Pgd(0.05, 0.0125, 10)


@pytest.fixture(scope="module")
def undefended() -> nn.Module:
    return train_clean(seed=0, count=2000)


@pytest.fixture(scope="module")
def saturated() -> tuple[Tensor, Tensor]:
    """More than half of the pixels are 0 or 1."""
    test = images().test
    x, y = test.pixels()[:400], test.labels[:400]
    assert ((x == 0) | (x == 1)).float().mean() > 0.4
    return x, y


def test_gradients_through_the_clamp_are_flagged(undefended: nn.Module, saturated: tuple[Tensor, Tensor]) -> None:
    check = attack_strength(undefended, *saturated, clamp_in_graph(SETTINGS, seed=1), SETTINGS)
    assert check.status == "fail", check.detail


def test_the_same_attack_with_the_clamp_outside_passes(undefended: nn.Module, saturated: tuple[Tensor, Tensor]) -> None:
    check = attack_strength(undefended, *saturated, clamp_outside_graph(SETTINGS, seed=1), SETTINGS)
    assert check.status == "pass", check.detail


def test_without_saturated_pixels_the_clamp_passes(undefended: nn.Module, saturated: tuple[Tensor, Tensor]) -> None:
    """Shows that the check flags the clamp, and not another weakness of the planted attack."""
    x, y = 0.2 + 0.6 * saturated[0], saturated[1]
    check = attack_strength(undefended, x, y, clamp_in_graph(SETTINGS, seed=1), SETTINGS)
    assert check.status == "pass", check.detail


@pytest.mark.parametrize("attack", [lambda model, x, y: 1 - x, lambda model, x, y: x * torch.nan])
def test_points_outside_the_ball_break_nothing(
    attack: Callable[..., Tensor], undefended: nn.Module, saturated: tuple[Tensor, Tensor]
) -> None:
    check = attack_strength(undefended, *saturated, attack, SETTINGS)
    assert check.status == "fail"
    assert "400 of theirs outside the ball count as the image" in check.detail


def test_the_gain_by_choosing_an_expert_is_not_that_under_an_attack_from_which_the_router_hides(
    sound: Planted, data: tuple[Tensor, Tensor]
) -> None:
    """Expert 3 alone is as robust as the routed network; PGD-10 does not see that images can be sent to the untrained experts."""
    routing = evaluate(sound, *data, epsilon=EPSILON, preset="quick").routing
    assert routing is not None
    assert routing.choice_gain[3].low > 10
    assert routing.choice_gain_worst[3].value < 5

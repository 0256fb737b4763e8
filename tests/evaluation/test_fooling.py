"""What fools a network whose smallest adversarial change is known by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from advmoe.data.single import read_image
from advmoe.evaluation.fooling import CLOSE, THOROUGH, Fooled, Victim, beyond, first_to_fool, in_eight_bits, smallest, write_image
from advmoe.moe import HARD, Gate, Routing

SHAPE = (1, 4, 4)
WEIGHTS = torch.linspace(-1, 1, 16).reshape(SHAPE)
NORM = float(WEIGHTS.abs().sum())


class Linear:
    """Logits (0, w x - b, -9): x of w x < b is of class 0, and b - w x = epsilon * |w|_1 is the distance to class 1."""

    def __init__(self, x: Tensor, epsilon: float) -> None:
        self.bias = float((WEIGHTS * x).sum()) + epsilon * NORM

    def __call__(self, x: Tensor) -> Tensor:
        value = (WEIGHTS * x).flatten(1).sum(dim=1) - self.bias
        return torch.stack([torch.zeros_like(value), value, torch.full_like(value, -9)], dim=1)

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, tuple[Routing, ...]]:
        return self(x), ()


def victim(epsilon: float, x: Tensor | None = None) -> Victim:
    x = torch.full(SHAPE, 128 / 255) if x is None else x
    network = Linear(x, epsilon)
    return Victim(network, network, x, 0, 3, routed=False)


def silent(*_: Any) -> None:
    pass


def test_attacks_in_order_up_to_the_first_that_fools() -> None:
    told: list[tuple[str, float, bool]] = []
    found = first_to_fool(victim(0.1), 0.11, lambda *what: told.append(what), THOROUGH)
    assert told == [("pgd_50", 0.11, True)]
    assert found is not None
    assert found.attack == "pgd_50"
    assert 0.1 < found.epsilon <= 0.11 + 1e-6


def test_all_are_tried_where_none_fools_but_those_on_routing() -> None:
    told: list[str] = []
    assert first_to_fool(victim(0.1), 0.09, lambda name, *_: told.append(name), THOROUGH) is None
    assert told == ["pgd_50", "apgd_ce", "apgd_dlr", "apgd_t"]


def test_beyond_doubles_until_something_fools() -> None:
    told: list[float] = []
    found, withstood = beyond(victim(0.1), 0.02, lambda name, epsilon, _: told.append(epsilon))
    assert found is not None
    assert withstood == pytest.approx(0.08)
    assert sorted(set(told)) == pytest.approx([0.04, 0.08, 0.16])


def test_beyond_ends_at_one() -> None:
    assert beyond(victim(2.0), 0.4, silent) == (None, 1.0)


@pytest.mark.parametrize("epsilon", [0.003, 0.05, 0.3])
def test_bisection_ends_just_above_the_true_distance(epsilon: float) -> None:
    attacked = victim(epsilon)
    first = first_to_fool(attacked, 0.4, silent, THOROUGH)
    assert first is not None
    found = smallest(attacked, first, 0.0, silent)
    assert attacked.is_fooled(found.x_adv)
    assert found.epsilon == pytest.approx(float((found.x_adv - attacked.x).abs().max()))
    assert epsilon * (1 - 1e-4) <= found.epsilon <= epsilon / (1 - CLOSE) * 1.02


def test_eight_bits_where_they_suffice(tmp_path: Path) -> None:
    attacked = victim(2.5 / 255)
    found = first_to_fool(attacked, 3.4 / 255, silent, THOROUGH)
    assert found is not None
    levels = in_eight_bits(attacked, found, 3.4 / 255)
    assert levels is not None
    assert float((levels - attacked.x).abs().max()) <= 3 / 255 + 1e-6
    write_image(levels, tmp_path / "x.png")
    back = read_image(tmp_path / "x.png", SHAPE)
    assert torch.equal(back.pixels, levels)
    assert attacked.is_fooled(back.pixels)


def test_floats_where_eight_bits_do_not_suffice(tmp_path: Path) -> None:
    attacked = victim(2.5 / 255)
    found = first_to_fool(attacked, 2.9 / 255, silent, THOROUGH)
    assert found is not None
    assert in_eight_bits(attacked, found, 2.9 / 255) is None  # whole levels reach 2 / 255, inside the ball
    write_image(found.x_adv, tmp_path / "x.npy")
    back = read_image(tmp_path / "x.npy", SHAPE)
    assert torch.equal(back.pixels, found.x_adv)
    assert attacked.is_fooled(back.pixels)


def test_image_between_levels_may_have_none_in_its_ball() -> None:
    attacked = victim(0.1 / 255, torch.full(SHAPE, 128.5 / 255))
    assert in_eight_bits(attacked, Fooled(attacked.x, "pgd_50", 0.0), 0.3 / 255) is None


def test_answers_that_are_not_finite_do_not_count() -> None:
    network = Linear(torch.zeros(SHAPE), torch.nan)
    attacked = Victim(network, network, torch.zeros(SHAPE), 0, 3, routed=False)
    assert not attacked.is_fooled(attacked.x)

"""The smallest change that fools a linear network, where it is known by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from advmoe.data.single import read_image
from advmoe.errors import UserError
from advmoe.evaluation.fooling import CLOSE, THOROUGH, Fooled, Victim, beyond, first_to_fool, in_eight_bits, smallest, write_image
from advmoe.moe import HARD, Gate, Routing

SHAPE = (1, 4, 4)
WEIGHTS = torch.linspace(-1, 1, 16).reshape(SHAPE)
NORM = float(WEIGHTS.abs().sum())


class Linear:
    """Logits (0, w x - b, -9). If w x < b, x is of class 0, and (b - w x) / |w|_1 = epsilon is its distance to class 1."""

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


def ignore(*_: Any) -> None:
    pass


def test_attacks_run_in_order_until_one_fools() -> None:
    attempts: list[tuple[str, float, bool]] = []
    fooled = first_to_fool(victim(0.1), 0.11, lambda *attempt: attempts.append(attempt), THOROUGH)
    assert attempts == [("pgd_50", 0.11, True)]
    assert fooled is not None
    assert fooled.attack == "pgd_50"
    assert 0.1 < fooled.epsilon <= 0.11 + 1e-6


def test_a_plain_network_that_is_not_fooled_gets_every_attack_for_plain_networks() -> None:
    attacks: list[str] = []
    assert first_to_fool(victim(0.1), 0.09, lambda name, *_: attacks.append(name), THOROUGH) is None
    assert attacks == ["pgd_50", "apgd_ce", "apgd_dlr", "apgd_t"]


def test_beyond_doubles_epsilon_until_an_attack_fools() -> None:
    epsilons: list[float] = []
    fooled, withstood = beyond(victim(0.1), 0.02, lambda name, epsilon, _: epsilons.append(epsilon))
    assert fooled is not None
    assert withstood == pytest.approx(0.08)
    assert sorted(set(epsilons)) == pytest.approx([0.04, 0.08, 0.16])


def test_beyond_ends_at_one() -> None:
    assert beyond(victim(2.0), 0.4, ignore) == (None, 1.0)


@pytest.mark.parametrize("epsilon", [0.003, 0.05, 0.3])
def test_bisection_ends_just_above_the_true_distance(epsilon: float) -> None:
    network = victim(epsilon)
    first = first_to_fool(network, 0.4, ignore, THOROUGH)
    assert first is not None
    closest = smallest(network, first, 0.0, ignore)
    assert network.is_fooled(closest.x_adv)
    assert closest.epsilon == pytest.approx(float((closest.x_adv - network.x).abs().max()))
    assert epsilon * (1 - 1e-4) <= closest.epsilon <= epsilon / (1 - CLOSE) * 1.02


def test_an_image_that_fools_in_eight_bits_is_written_as_png(tmp_path: Path) -> None:
    network = victim(2.5 / 255)
    fooled = first_to_fool(network, 3.4 / 255, ignore, THOROUGH)
    assert fooled is not None
    levels = in_eight_bits(network, fooled, 3.4 / 255)
    assert levels is not None
    assert float((levels - network.x).abs().max()) <= 3 / 255 + 1e-6
    write_image(levels, tmp_path / "x.png")
    image = read_image(tmp_path / "x.png", SHAPE)
    assert torch.equal(image.pixels, levels)
    assert network.is_fooled(image.pixels)


def test_an_image_that_fools_only_in_floats_is_written_as_npy(tmp_path: Path) -> None:
    network = victim(2.5 / 255)
    fooled = first_to_fool(network, 2.9 / 255, ignore, THOROUGH)
    assert fooled is not None
    assert in_eight_bits(network, fooled, 2.9 / 255) is None  # the largest change in eight bits is 2 / 255
    write_image(fooled.x_adv, tmp_path / "x.npy")
    image = read_image(tmp_path / "x.npy", SHAPE)
    assert torch.equal(image.pixels, fooled.x_adv)
    assert network.is_fooled(image.pixels)


def test_a_small_ball_may_hold_no_image_of_eight_bits() -> None:
    network = victim(0.1 / 255, torch.full(SHAPE, 128.5 / 255))
    assert in_eight_bits(network, Fooled(network.x, "pgd_50", 0.0), 0.3 / 255) is None


def test_logits_that_are_not_finite_are_refused() -> None:
    network = Linear(torch.zeros(SHAPE), torch.nan)
    target = Victim(network, network, torch.zeros(SHAPE), 0, 3, routed=False)
    with pytest.raises(UserError, match="logits that are not finite"):
        target.is_fooled(target.x)

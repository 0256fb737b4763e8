"""GAMA-PGD on linear networks, where the right result is known."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks import ImageDraws, frozen
from advmoe.attacks import gama as gama_attack
from advmoe.attacks.gama import gama


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval()


def test_breaks_exactly_what_a_linear_network_allows() -> None:
    """A linear network of two classes is fooled if epsilon exceeds the margin over the L1 norm of the weights' difference."""
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).eval(), 0.3 + 0.4 * torch.rand(40, 1, 6, 6)
    with frozen(model), torch.no_grad():
        logits = model(x)
        y, weight = logits.argmax(dim=1), model[1].weight
        distance = (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).abs().sum()
        epsilon = distance.median().item()
        x_adv = gama(model, x, y, epsilon, 40, ImageDraws(0, range(40)))
        broken = model(x_adv).argmax(dim=1) != y
    clear = (distance - epsilon).abs() > 0.02 * epsilon
    assert torch.equal(broken[clear], (distance < epsilon)[clear])
    assert 15 <= int(broken.sum()) <= 25


def test_the_guide_is_the_squared_distance_from_the_clean_probabilities() -> None:
    logits, clean, labels = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    # probabilities 1/4 and 3/4: margin 1/2, squared distance 2 / 16
    assert gama_attack._guided(clean, 50.0)(logits, labels).item() == pytest.approx(0.5 + 50 / 8)


def test_the_guide_fades_and_the_steps_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fools this network, and no step leaves the ball. Of 40 steps 10 are guided, and steps shrink after 24 and 34."""
    weights, points = [], []

    def forward_backward(predict: Any, x: Tensor, target: Tensor, objective: Any) -> tuple[Tensor, Tensor, Tensor]:
        points.append(x.clone())
        return torch.tensor([[1.0, 0.0]]), torch.zeros(1), torch.ones_like(x)

    def guided(clean: Tensor, weight: float) -> str:
        weights.append(weight)
        return "objective"

    monkeypatch.setattr(gama_attack, "forward_backward", forward_backward)
    monkeypatch.setattr(gama_attack, "_guided", guided)
    monkeypatch.setattr(gama_attack, "project", lambda moved, x, epsilon: moved)
    gama(lambda x: torch.zeros(1, 2), torch.zeros(1, 1, 2, 2), torch.tensor([0]), 0.5, 40, ImageDraws(0, [0]))
    assert weights == pytest.approx([50.0 * max(0.0, 1 - number / 10) for number in range(40)])
    steps = [float((later - earlier).mean()) for earlier, later in pairwise(points)]
    assert steps == pytest.approx([1.0] * 24 + [0.1] * 10 + [0.01] * 5, rel=1e-3)


def test_the_result_is_in_the_ball_and_in_the_pixel_range() -> None:
    model, x = linear(), torch.rand(8, 1, 6, 6)
    with frozen(model):
        x_adv = gama(model, x, model(x).argmax(dim=1), 0.05, 20, ImageDraws(0, range(8)))
    assert (x_adv - x).abs().max() <= 0.05 + 1e-6
    assert 0 <= x_adv.min() <= x_adv.max() <= 1


def test_an_images_result_does_not_depend_on_its_batch() -> None:
    model, x = linear(), torch.rand(6, 1, 6, 6)
    with frozen(model):
        y = model(x).argmax(dim=1)
        together = gama(model, x, y, 0.01, 10, ImageDraws(3, range(6)))
        alone = gama(model, x[2:3], y[2:3], 0.01, 10, ImageDraws(3, [2]))
    torch.testing.assert_close(together[2:3], alone)

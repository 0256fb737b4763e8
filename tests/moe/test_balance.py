import math

import pytest
import torch

from advmoe.moe import Routing, balance
from advmoe.moe.balance import BALANCE

TERMS = ["switch", "importance", "entropy"]


def routing(p, experts=None):
    """A routing whose softmax is `p` [B, N]."""
    logits = torch.tensor(p, dtype=torch.float64).log().requires_grad_(True)
    return Routing(logits, logits.argmax(dim=1) if experts is None else torch.tensor(experts))


UNEVEN = [[0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.2, 0.8]]  # f = (3/4, 1/4), P = (0.6, 0.4)


def test_switch_by_hand():
    assert balance("switch", (routing(UNEVEN),)).item() == pytest.approx(2 * (0.75 * 0.6 + 0.25 * 0.4) - 1, rel=1e-6)


def test_importance_by_hand():
    # P = (0.6, 0.4): variance 0.01, mean 0.5
    assert balance("importance", (routing(UNEVEN),)).item() == pytest.approx(0.04, rel=1e-6)


def test_entropy_by_hand():
    expected = math.log(2) + 0.6 * math.log(0.6) + 0.4 * math.log(0.4)
    assert balance("entropy", (routing(UNEVEN),)).item() == pytest.approx(expected, rel=1e-6)


def test_three_experts_by_hand():
    # f = (1/2, 1/2, 0), P = (0.45, 0.45, 0.1): variance (2 * 0.35^2 / 9 + 0.7^2 / 9) / 3 = 0.0272..., mean 1/3
    three = routing([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1]])
    assert balance("switch", (three,)).item() == pytest.approx(0.35, rel=1e-6)
    assert balance("importance", (three,)).item() == pytest.approx(0.245, rel=1e-6)
    expected = math.log(3) + 0.9 * math.log(0.45) + 0.1 * math.log(0.1)
    assert balance("entropy", (three,)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("term", TERMS)
def test_balanced_routes_cost_nothing(term):
    even = routing([[0.9, 0.1], [0.1, 0.9], [0.3, 0.7], [0.7, 0.3]])
    assert balance(term, (even,)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("term", TERMS)
def test_the_cost_grows_with_the_imbalance(term):
    costs = [balance(term, (routing([[p, 1 - p]] * 4),)).item() for p in (0.6, 0.8, 0.99)]
    assert 0 < costs[0] < costs[1] < costs[2]


@pytest.mark.parametrize("term", TERMS)
def test_gradient_pushes_towards_the_idle_expert(term):
    busy = routing([[0.8, 0.15, 0.05]] * 4)
    balance(term, (busy,)).backward()
    assert (busy.logits.grad[:, 0] > 0).all()  # descent lowers the busy expert's logit
    assert (busy.logits.grad[:, 2] < 0).all()
    assert busy.logits.grad.sum(dim=1).abs().max() < 1e-12


@pytest.mark.parametrize("term", TERMS)
def test_the_term_is_the_mean_over_layers(term):
    layers = routing(UNEVEN), routing([[0.99, 0.01]] * 3)
    each = [balance(term, (layer,)).item() for layer in layers]
    assert balance(term, layers).item() == pytest.approx(sum(each) / 2)


def test_every_term_is_tested():
    assert set(BALANCE) == set(TERMS)


@pytest.mark.parametrize("term", TERMS)
def test_one_expert_is_always_balanced(term):
    assert balance(term, (routing([[1.0], [1.0]]),)).item() == pytest.approx(0, abs=1e-12)


def test_shifted_logits_change_nothing():
    plain = routing(UNEVEN)
    shifted = Routing(plain.logits + 1000, plain.experts)
    for term in TERMS:
        assert balance(term, (shifted,)).item() == pytest.approx(balance(term, (plain,)).item(), abs=1e-9)


def test_entropy_of_a_collapsed_layer_has_a_gradient():
    """One expert's probability is exactly 0 in float32: the term must work in this case."""
    logits = torch.tensor([[200.0, 0.0], [210.0, 0.0]], requires_grad=True)
    term = BALANCE["entropy"](Routing(logits, logits.argmax(dim=1)))
    term.backward()
    assert term.item() == pytest.approx(math.log(2), rel=1e-6)
    assert torch.isfinite(logits.grad).all()

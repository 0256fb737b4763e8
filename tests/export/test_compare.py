"""What counts as the same answer."""

import pytest
import torch

from advmoe.config import ModelConfig
from advmoe.data import ImageSpec
from advmoe.export.compare import TOLERANCE, Agreement, Outputs, agreement, compare, outputs
from advmoe.models import build_model
from advmoe.moe import DenseKind, MoEKind
from advmoe.moe.routing import Router

LOGITS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
ROUTES = torch.tensor([[0, 1], [1, 1], [0, 0]])
PIXELS = torch.rand(3, 1, 4, 4)


def reference(undecided=(False, False, False)):
    return Outputs(LOGITS, ROUTES, torch.tensor(undecided))


def predictor(logits=LOGITS, routes=ROUTES):
    """A network that knows the next rows of its answers."""
    rows = iter(range(len(logits)))

    def predict(pixels):
        close_outputs = [next(rows) for _ in range(len(pixels))]
        return logits[close_outputs], routes[close_outputs]

    return predict


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_same_answers_are_equal(batch):
    comparison = compare(reference(), predictor(), PIXELS, batch)
    assert comparison.equal
    assert (comparison.images, comparison.undecided, comparison.largest) == (3, (), 0.0)


def test_a_logit_may_be_off_by_the_tolerance_and_no_more():
    logits = LOGITS.clone()
    logits[0, 0] += 0.5 * TOLERANCE
    logits[2, 1] += 2 * TOLERANCE
    comparison = compare(reference(), predictor(logits), PIXELS, 2)
    assert comparison.differing == (2,)
    assert comparison.largest == pytest.approx(2 * TOLERANCE, rel=1e-2)


def test_large_logits_may_be_off_by_a_share_of_the_largest():
    large = torch.tensor([[795.0, 0.0], [0.0, 795.0], [1.0, 0.0]])
    off = torch.tensor([[0.0, 0.005], [0.0, 0.05], [0.005, 0.0]])
    comparison = compare(Outputs(large, ROUTES, torch.zeros(3, dtype=torch.bool)), predictor(large + off), PIXELS, 3)
    assert comparison.differing == (1, 2)


def test_another_route_differs_unless_rounding_decides_it():
    routes = ROUTES.clone()
    routes[1, 0] = 0
    assert compare(reference(), predictor(routes=routes), PIXELS, 3).differing == (1,)
    logits = LOGITS.clone()
    logits[1] = torch.tensor([5.0, 0.0])
    comparison = compare(reference((False, True, False)), predictor(logits, routes), PIXELS, 3)
    assert comparison.equal
    assert comparison.undecided == (1,)
    assert comparison.largest == 0.0


def test_nothing_is_equal_if_nothing_is_compared():
    comparison = compare(reference([True] * 3), predictor(LOGITS.flip(1)), PIXELS, 3)
    assert (comparison.compared, comparison.equal, comparison.differing) == (0, False, ())


def test_another_class_and_a_nan_differ():
    close = LOGITS[:1].repeat(3, 1) * 0 + torch.tensor([[0.0, 2e-5]])
    close_outputs = Outputs(close, ROUTES, torch.zeros(3, dtype=torch.bool))
    assert compare(close_outputs, predictor(close.flip(1)), PIXELS, 3).differing == (0, 1, 2)
    broken = LOGITS.clone()
    broken[1, 0] = torch.nan
    assert compare(reference(), predictor(broken), PIXELS, 3).differing == (1,)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_agreement_counts_classes_routes_and_what_accuracy_gains(batch):
    logits, routes, labels = LOGITS.clone(), ROUTES.clone(), torch.tensor([1, 1, 0])
    logits[0] = torch.tensor([0.0, 1.0])  # now right
    routes[1, 1] = 0
    comparison = agreement(reference(), predictor(logits, routes), PIXELS, labels, batch)
    assert comparison == Agreement(batch, 3, pytest.approx(200 / 3), pytest.approx(200 / 3), pytest.approx(100 / 3))
    assert agreement(reference(), predictor(), PIXELS, None, batch) == Agreement(batch, 3, 100.0, 100.0, None)


def test_a_route_is_undecided_if_the_margin_of_any_router_is_tiny():
    torch.manual_seed(0)
    spec = ImageSpec(("a", "b"), (1, 32, 32), (0.5,), (0.5,))
    model = build_model(ModelConfig(backbone="vgg16_bn", width=4), MoEKind(0.5, 3), spec).eval()
    pixels = torch.rand(5, 1, 32, 32)
    first, *others = [module.linear.weight.data for module in model.modules() if isinstance(module, Router)]
    for weight in (first, *others):
        weight.mul_(1e4)  # an untrained network has tiny activations
    assert outputs(model, pixels).undecided.tolist() == [False] * 5
    first.fill_(torch.nan)  # such a network is compared, and differs
    assert outputs(model, pixels).undecided.tolist() == [False] * 5
    first.zero_()  # its logits are equal for every image
    assert outputs(model, pixels).undecided.tolist() == [True] * 5
    dense = outputs(build_model(ModelConfig(backbone="vgg16_bn", width=4), DenseKind(), spec).eval(), pixels)
    assert dense.undecided.tolist() == [False] * 5
    assert dense.routes.shape == (5, 0)

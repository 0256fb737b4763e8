"""What counts as the same answer."""

import pytest
import torch

from advmoe.config import ModelConfig
from advmoe.data import ImageSpec
from advmoe.export.compare import MARGIN, TOLERANCE, Agreement, Answers, agreement, answers, compare
from advmoe.models import build_model
from advmoe.moe import DenseKind, MoEKind

LOGITS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
ROUTES = torch.tensor([[0, 1], [1, 1], [0, 0]])
PIXELS = torch.rand(3, 1, 4, 4)


def known(margins=(1.0, 1.0, 1.0)):
    return Answers(LOGITS, ROUTES, torch.tensor(margins))


def says(logits=LOGITS, routes=ROUTES):
    """A network that knows the next rows of its answers."""
    rows = iter(range(len(logits)))

    def predict(pixels):
        own = [next(rows) for _ in range(len(pixels))]
        return logits[own], routes[own]

    return predict


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_same_answers_are_equal(batch):
    found = compare(known(), says(), PIXELS, batch)
    assert found.equal
    assert (found.images, found.undecided, found.largest) == (3, (), 0.0)


def test_a_logit_may_be_off_by_the_tolerance_and_no_more():
    logits = LOGITS.clone()
    logits[0, 0] += 0.5 * TOLERANCE
    logits[2, 1] += 2 * TOLERANCE
    found = compare(known(), says(logits), PIXELS, 2)
    assert found.differing == (2,)
    assert found.largest == pytest.approx(2 * TOLERANCE, rel=1e-2)


def test_large_logits_may_be_off_by_a_share_of_the_largest():
    large = torch.tensor([[795.0, 0.0], [0.0, 795.0], [1.0, 0.0]])
    off = torch.tensor([[0.0, 0.005], [0.0, 0.05], [0.005, 0.0]])
    found = compare(Answers(large, ROUTES, torch.ones(3)), says(large + off), PIXELS, 3)
    assert found.differing == (1, 2)


def test_another_route_differs_unless_rounding_decides_it():
    routes = ROUTES.clone()
    routes[1, 0] = 0
    assert compare(known(), says(routes=routes), PIXELS, 3).differing == (1,)
    logits = LOGITS.clone()
    logits[1] = torch.tensor([5.0, 0.0])
    found = compare(known((1.0, 0.9 * MARGIN, 1.0)), says(logits, routes), PIXELS, 3)
    assert found.equal
    assert found.undecided == (1,)
    assert found.largest == 0.0


def test_another_class_and_a_nan_differ():
    close = LOGITS[:1].repeat(3, 1) * 0 + torch.tensor([[0.0, 2e-5]])
    own = Answers(close, ROUTES, torch.ones(3))
    assert compare(own, says(close.flip(1)), PIXELS, 3).differing == (0, 1, 2)
    broken = LOGITS.clone()
    broken[1, 0] = torch.nan
    assert compare(known(), says(broken), PIXELS, 3).differing == (1,)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_agreement_counts_classes_routes_and_what_accuracy_gains(batch):
    logits, routes, labels = LOGITS.clone(), ROUTES.clone(), torch.tensor([1, 1, 0])
    logits[0] = torch.tensor([0.0, 1.0])  # now right
    routes[1, 1] = 0
    found = agreement(known(), says(logits, routes), PIXELS, labels, batch)
    assert found == Agreement(batch, 3, pytest.approx(200 / 3), pytest.approx(200 / 3), pytest.approx(100 / 3))
    assert agreement(known(), says(), PIXELS, None, batch) == Agreement(batch, 3, 100.0, 100.0, None)


def test_margins_are_the_least_over_layers():
    torch.manual_seed(0)
    spec = ImageSpec(("a", "b"), (1, 8, 8), (0.5,), (0.5,))
    model = build_model(ModelConfig(backbone="vgg16_bn", width=4), MoEKind(0.5, 3), spec).eval()
    pixels = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        _, routings = model.forward_routed(pixels)
    for row, margin in enumerate(answers(model, pixels).margins.tolist()):
        layers = [sorted(routing.logits[row].tolist()) for routing in routings]
        assert margin == pytest.approx(min((layer[-1] - layer[-2]) / max(1, abs(layer[-1])) for layer in layers))
    dense = answers(build_model(ModelConfig(backbone="vgg16_bn", width=4), DenseKind(), spec).eval(), pixels)
    assert dense.margins.isinf().all()
    assert dense.routes.shape == (5, 0)

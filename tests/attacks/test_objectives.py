import pytest
import torch

from advmoe.attacks.objectives import (
    cross_entropy,
    dlr,
    kl_divergence,
    margin,
    probability_margin,
    scaled_cross_entropy,
    targeted_dlr,
    targeted_margin,
)

FOUR, THREE, TWO = [3.0, 1.0, 2.0, 0.0], [3.0, 1.0, 2.0], [3.0, 1.0]
OBJECTIVES = {
    "cross_entropy": cross_entropy, "margin": margin, "probability_margin": probability_margin,
    "scaled_cross_entropy": scaled_cross_entropy, "dlr": dlr, "targeted_margin": targeted_margin, "targeted_dlr": targeted_dlr,
}  # fmt: skip
TEN = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("logits", "label", "expected"),
    [
        (FOUR, 0, -1 / 2),  # -(3 - 2) / (3 - 1)
        (FOUR, 2, 1 / 2),
        (FOUR, 3, 3 / 2),
        (THREE, 0, -1 / 2),
        (THREE, 1, 1),
        (TWO, 0, -2),  # the margin
        (TWO, 1, 2),
        (TEN, 0, -1 / 2),
        (TEN, 4, 2),
    ],
)
def test_dlr_by_hand(logits, label, expected):
    assert dlr(torch.tensor([logits]), torch.tensor([label])).tolist() == pytest.approx([expected])


@pytest.mark.parametrize(
    ("logits", "label", "aim", "expected"),
    [
        (FOUR, 0, 1, -0.8),  # -(3 - 1) / (3 - (1 + 0) / 2)
        (FOUR, 0, 2, -0.4),
        (FOUR, 1, 0, 0.8),
        (FOUR, 2, 3, -0.8),
        (THREE, 0, 1, -4 / 3),  # -(3 - 1) / (3 - (2 + 1) / 2)
        (THREE, 0, 2, -2 / 3),
        (TWO, 0, 1, -2),
        (TWO, 1, 0, 2),
        (TEN, 0, 9, -3.6),  # -(9 - 0) / (9 - (7 + 6) / 2)
    ],
)
def test_targeted_dlr_by_hand(logits, label, aim, expected):
    assert targeted_dlr(torch.tensor([logits]), torch.tensor([[label, aim]])).tolist() == pytest.approx([expected])


def test_each_row_has_a_separate_target():
    logits = torch.tensor([FOUR, FOUR, FOUR])
    assert dlr(logits, torch.tensor([0, 2, 3])).tolist() == pytest.approx([-0.5, 0.5, 1.5])
    assert margin(logits, torch.tensor([0, 2, 3])).tolist() == pytest.approx([-1, 1, 3])
    assert targeted_dlr(logits, torch.tensor([[0, 1], [1, 0], [2, 3]])).tolist() == pytest.approx([-0.8, 0.8, -0.8])


def targets(logits, name):
    """A label for each row and, for a targeted objective, the class after it."""
    labels = torch.arange(len(logits)) % logits.shape[1]
    return torch.stack([labels, (labels + 1) % logits.shape[1]], dim=1) if name.startswith("targeted") else labels


def value_and_gradient(name, logits):
    leaf = logits.clone().requires_grad_(True)
    value = OBJECTIVES[name](leaf, targets(logits, name))
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("name", ["dlr", "targeted_dlr"])
@pytest.mark.parametrize("classes", [3, 4, 10])
@pytest.mark.parametrize(("shift", "scale"), [(100.0, 1.0), (-7.0, 1000.0), (0.0, 1e-3)])
def test_dlr_ignores_shift_and_scale(name, classes, shift, scale):
    logits = torch.randn(20, classes, generator=torch.Generator().manual_seed(1))
    value, _ = value_and_gradient(name, logits)
    other, _ = value_and_gradient(name, scale * logits + shift)
    torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["dlr", "targeted_dlr"])
def test_dlr_of_two_classes_keeps_order_and_gradient_direction_under_shift_and_scale(name):
    logits = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    value, gradient = value_and_gradient(name, logits)
    other, other_gradient = value_and_gradient(name, 1e-3 * logits + 5)
    assert torch.equal(other.argsort(), value.argsort())
    assert torch.equal(other_gradient.sign(), gradient.sign())
    assert (gradient != 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_no_objective_is_flat_on_an_image_that_is_classified_correctly(name, classes):
    logits = torch.randn(50, classes, generator=torch.Generator().manual_seed(2))
    rows, labels = torch.arange(50), torch.arange(50) % classes
    logits[rows, labels] = logits.amax(dim=1) + 0.5
    value, gradient = value_and_gradient(name, logits)
    assert value.shape == (50,)
    if name.startswith("targeted"):
        assert (gradient[rows, (labels + 1) % classes] > 0).all()
    else:
        assert (gradient[rows, labels] < 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_degenerate_logits_give_finite_values_and_gradients(name, classes, size):
    logits = size * torch.eye(classes)
    value, gradient = value_and_gradient(name, logits)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_positive_margins_are_misclassifications(classes):
    logits = torch.randn(50, classes, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(50) % classes
    wrong = logits.argmax(dim=1) != labels
    assert torch.equal(margin(logits, labels) > 0, wrong)
    assert torch.equal(dlr(logits, labels) > 0, wrong)


def test_half_precision_is_computed_in_single():
    assert dlr(torch.tensor([FOUR], dtype=torch.bfloat16), torch.tensor([0])).dtype == torch.float32


def test_kl_divergence_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): KL(p || q) = 3/4 ln 3/2 + 1/4 ln 1/2; KL(q || p) is 0.1438
    value = kl_divergence(torch.zeros(1, 2), torch.tensor([[0.75, 0.25]]).log())
    assert value.tolist() == pytest.approx([0.130812], rel=1e-4)

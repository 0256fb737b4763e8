import pytest
import torch
from image_specs import image_spec

from advmoe.models.resnet import ResNet
from advmoe.moe import MoEKind, Routing
from advmoe.training.health import NonFinite, Watch, collapsed_routers
from advmoe.training.losses import Outcome


def outcome(total=1.0, clean=(1.0, 2.0), robust=(1.0, 2.0), routers=((1.0, 2.0), (3.0, 4.0))):
    def rows(values):
        return None if values is None else torch.tensor([values])

    return Outcome(torch.tensor(total), rows(clean), rows(robust), tuple(Routing(rows(r), torch.tensor([0])) for r in routers))


def check_outcome(outcome, level):
    watch = Watch()
    watch.outcome(outcome, level)
    watch.check()


def check_gradients(model, level):
    watch = Watch()
    watch.gradients(model, level)
    watch.check()


def model_with_gradients():
    model = ResNet(MoEKind(0.5), image_spec(3), blocks=(1,), width=4, stem="cifar")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("field", "values", "name"),
    [
        ("clean", lambda bad: (1.0, bad), "clean logits (weights update)"),
        ("robust", lambda bad: (bad, 1.0), "robust logits (weights update)"),
        ("routers", lambda bad: ((1.0, 2.0), (bad, 1.0)), "logits of router 1 (weights update)"),
        ("total", lambda bad: bad, "loss (weights update)"),
    ],
)
def test_non_finite_names_the_tensor(field, values, name, bad):
    with pytest.raises(NonFinite) as error:
        check_outcome(outcome(**{field: values(bad)}), "weights")
    assert str(error.value) == name


def test_the_earliest_cause_is_named():
    nan = float("nan")
    with pytest.raises(NonFinite, match="logits of router 0"):
        check_outcome(outcome(total=nan, clean=(nan, 1.0), routers=((nan, 1.0), (nan, 1.0))), "routers")


def test_infinities_that_cancel_are_detected():
    with pytest.raises(NonFinite, match="robust logits"):
        check_outcome(outcome(robust=(float("inf"), float("-inf"))), "weights")


def test_finite_outcomes_pass():
    check_outcome(outcome(), "weights")
    check_outcome(outcome(clean=None, routers=()), "weights")
    check_outcome(outcome(robust=None), "weights")


def test_large_finite_values_pass():
    check_outcome(outcome(clean=(3e38, 3e38), robust=(-3e38, -3e38)), "weights")


def test_routers_that_fail_on_attacked_images_alone_are_named():
    """With the hard gate no logit says so: a NaN chooses some expert too."""
    first = outcome()
    bad = outcome(routers=((1.0, 2.0), (float("nan"), 1.0))).routings
    with pytest.raises(NonFinite, match=r"logits of router 1 on x' \(weights update\)"):
        check_outcome(first._replace(robust_routings=bad), "weights")
    check_outcome(first._replace(robust_routings=first.routings), "weights")


def test_gradients_are_named():
    model = model_with_gradients()
    check_gradients(model, "weights")
    model.blocks[0].conv2.filters.grad[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFinite) as error:
        check_gradients(model, "weights")
    assert str(error.value) == "gradient of blocks.0.conv2.filters (weights update)"


def test_parameters_without_gradients_are_skipped():
    model = model_with_gradients()
    model.stem[0].weight.grad = None
    check_gradients(model, "weights")


def test_gradients_of_frozen_parameters_are_skipped():
    model = model_with_gradients()
    model.stem[0].weight.grad.fill_(float("nan"))
    model.stem[0].weight.requires_grad_(False)
    check_gradients(model, "weights")


def test_a_failure_lasts_until_the_check_resets_it():
    watch, bad = Watch(), outcome(clean=(float("nan"), 1.0))
    watch.outcome(outcome(), "routers")
    assert watch.failed().item() == 0
    watch.outcome(bad, "routers")
    watch.outcome(outcome(), "weights")
    assert watch.failed().item() == 1
    with pytest.raises(NonFinite, match=r"clean logits \(routers update\)"):
        watch.check()
    watch.outcome(outcome(), "weights")
    assert watch.failed().item() == 0
    watch.check()


def test_half_and_single_precision_can_be_mixed():
    mixed = outcome()._replace(clean=torch.tensor([[3e38, 1.0]], dtype=torch.bfloat16))
    check_outcome(mixed, "weights")
    with pytest.raises(NonFinite, match="clean logits"):
        check_outcome(mixed._replace(clean=mixed.clean * 10), "weights")


def test_collapsed_routers_by_hand():
    load = torch.tensor([[96, 4], [95, 5], [0, 100], [50, 50]])
    assert collapsed_routers(load) == [(0, 0, pytest.approx(0.96)), (2, 1, 1.0)]


def test_collapsed_routers_of_many_experts():
    load = torch.tensor([[1, 0, 98, 1], [40, 20, 20, 20]])
    assert collapsed_routers(load) == [(0, 2, pytest.approx(0.98))]


def test_one_expert_never_collapses():
    assert collapsed_routers(torch.tensor([[100], [100]])) == []

import math

import pytest
import torch

from advmoe.errors import UserError
from advmoe.moe import (
    GATES,
    Chosen,
    ForcedGate,
    Gate,
    HardGate,
    OneHot,
    Router,
    Scaled,
    ScaledGate,
    SoftGate,
    StraightThroughGate,
    make_gate,
)  # fmt: skip

P = [0.2, 0.3, 0.5]


def logits_of(p=P):
    return torch.tensor([p], dtype=torch.float64).log().requires_grad_(True)


def make_router(in_channels=3, num_experts=4):
    torch.manual_seed(1)
    router = Router(in_channels, num_experts).double()
    router.mean.normal_()
    router.var.uniform_(0.5, 2)
    return router.eval()


def constant_images(*values):
    """Images of one channel with these means."""
    return torch.tensor(values)[:, None, None, None] + torch.tensor([[-1.0, 1.0], [2.0, -2.0]])


def test_logits_are_linear_in_the_standardised_pool():
    router = Router(2, 2).double().eval()
    router.mean.copy_(torch.tensor([1.0, 2.0]))
    router.var.copy_(torch.tensor([4.0, 0.25]) - 1e-5)
    with torch.no_grad():
        router.linear.weight.copy_(torch.tensor([[1.0, 0.0], [3.0, -1.0]]))
        router.linear.bias.copy_(torch.tensor([0.5, 0.0]))
    x = torch.tensor([[[[1.0, 9.0]], [[0.0, 3.0]]]], dtype=torch.float64)
    # pools 5 and 1.5; standardised (5 - 1) / 2 = 2 and (1.5 - 2) / 0.5 = -1; logits 2 + 0.5 and 3 * 2 + 1
    torch.testing.assert_close(router(x), torch.tensor([[2.5, 7.0]], dtype=torch.float64), rtol=1e-6, atol=0)


def test_statistics_average_the_first_batches_in_full():
    router = Router(1, 2).train()
    router(constant_images(1.0, 3.0))  # mean 2, variance 1
    assert (router.mean.item(), router.var.item()) == (2.0, 1.0)
    router(constant_images(5.0, 9.0))  # mean 7, variance 4
    assert (router.mean.item(), router.var.item()) == (4.5, 2.5)
    router(constant_images(0.0, 0.0))
    assert router.mean.item() == pytest.approx(3.0, rel=1e-6)
    assert router.var.item() == pytest.approx(5 / 3, rel=1e-6)
    assert router.batches.item() == 3


def test_later_batches_count_with_the_momentum():
    router = Router(1, 2).train()
    router.batches.fill_(50)
    router(constant_images(8.0, 12.0))  # mean 10, variance 4: 0.9 * 0 + 0.1 * 10 and 0.9 * 1 + 0.1 * 4
    assert router.mean.item() == pytest.approx(1.0, rel=1e-6)
    assert router.var.item() == pytest.approx(1.3, rel=1e-6)


def test_train_mode_standardises_by_the_updated_statistics():
    router = Router(1, 2).train()
    x = constant_images(1.0, 3.0)
    standardised = torch.tensor([[-1.0], [1.0]])
    torch.testing.assert_close(router(x), router.linear(standardised), rtol=1e-4, atol=1e-5)


def test_eval_mode_does_not_change_statistics():
    router = make_router()
    before = {name: value.clone() for name, value in router.named_buffers()}
    router(torch.randn(6, 3, 4, 4, dtype=torch.float64))
    assert set(before) == {"mean", "var", "batches"}
    for name, value in router.named_buffers():
        assert torch.equal(value, before[name])


def test_statistics_need_no_gradient():
    router = Router(3, 4).train()
    router(torch.randn(6, 3, 4, 4, requires_grad=True)).sum().backward()
    assert not router.mean.requires_grad
    assert not router.var.requires_grad


def test_an_images_logits_do_not_depend_on_its_batch():
    router, x = make_router(), torch.randn(9, 3, 4, 4, dtype=torch.float64)
    together = router(x)
    for i in range(9):
        torch.testing.assert_close(router(x[i : i + 1])[0], together[i], rtol=1e-12, atol=1e-14)
    assert len(together.argmax(dim=1).unique()) > 1


def test_logits_stay_float32_under_bfloat16_autocast():
    router, x = make_router().float(), torch.randn(6, 3, 4, 4)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.nn.functional.linear(x, torch.ones(4, 4)).dtype == torch.bfloat16
        cast = router(x)
        from_lower = router(x.bfloat16())
    assert cast.dtype == from_lower.dtype == torch.float32
    assert torch.equal(cast, plain)
    assert torch.equal(from_lower, router(x.bfloat16().float()))


def test_statistics_stay_float32_under_bfloat16_autocast():
    router = Router(1, 2).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        router(torch.tensor([1.0, 1.0, 1.0 + 2**-7, 1.0 + 2**-7]).view(4, 1, 1, 1).bfloat16())
    assert router.mean.item() == 1 + 2**-8
    assert router.var.item() == 2**-16


def test_hard_chooses_the_expert_with_the_highest_logit():
    weights = HardGate().weights(torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 4.0]]), 0)
    assert weights.experts.tolist() == [1, 0]
    assert type(weights) is Chosen


def test_soft_is_the_softmax():
    logits = logits_of()
    weights = SoftGate().weights(logits, 0)
    assert weights.mixture[0].tolist() == pytest.approx(P, rel=1e-12)
    assert weights.experts.tolist() == [2]
    (weights.mixture[0] @ torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)).backward()
    # p * (c - p . c) with p . c = 2.8
    assert logits.grad[0].tolist() == pytest.approx([0.2 * -1.8, 0.3 * -0.8, 0.5 * 1.2], rel=1e-12)


def test_temperature_divides_the_logits():
    weights = SoftGate(temperature=0.5).weights(logits_of(), 0)  # p to the power of 2
    assert weights.mixture[0].tolist() == pytest.approx([0.04 / 0.38, 0.09 / 0.38, 0.25 / 0.38], rel=1e-12)


def test_straight_through_has_the_value_of_hard_and_the_gradient_of_soft():
    logits = logits_of()
    weights = StraightThroughGate().weights(logits, 0)
    assert type(weights) is OneHot
    assert weights.mixture[0].tolist() == pytest.approx([0, 0, 1], abs=1e-15)
    assert weights.experts.tolist() == [2]
    (weights.mixture[0] @ torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)).backward()
    assert logits.grad[0].tolist() == pytest.approx([-0.36, -0.24, 0.6], rel=1e-12)


def test_straight_through_gradient_depends_on_the_temperature():
    logits = logits_of()
    mixture = StraightThroughGate(temperature=0.5).weights(logits, 0).mixture
    mixture[0, 2].backward()
    p = [0.04 / 0.38, 0.09 / 0.38, 0.25 / 0.38]
    expected = [-p[2] * p[0] / 0.5, -p[2] * p[1] / 0.5, p[2] * (1 - p[2]) / 0.5]
    assert logits.grad[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_straight_through_weights_are_exactly_one_hot_in_float32():
    logits = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    mixture = StraightThroughGate().weights(logits, 0).mixture
    assert torch.equal(mixture, torch.nn.functional.one_hot(logits.argmax(dim=1), 3).float())


def test_scaled_multiplies_by_one_and_has_the_gradient_of_the_chosen_probability():
    logits = logits_of()
    weights = ScaledGate().weights(logits, 0)
    assert type(weights) is Scaled
    assert weights.experts.tolist() == [2]
    assert weights.factor.tolist() == pytest.approx([1.0], abs=1e-15)
    weights.factor.sum().backward()
    # p_k * (1[k] - p)
    assert logits.grad[0].tolist() == pytest.approx([-0.1, -0.15, 0.25], rel=1e-12)


def test_scaled_factor_is_exactly_one_in_float32():
    logits = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ScaledGate().weights(logits, 0).factor, torch.ones(2000))


def test_forced_uses_the_layers_column_and_for_minus_one_the_routers_choice():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 4.0], [0.0, 0.0, 7.0]])
    gate = ForcedGate(torch.tensor([[2, 0], [-1, -1], [1, -1]]))
    assert gate.weights(logits, 0).experts.tolist() == [2, 0, 1]
    assert gate.weights(logits, 1).experts.tolist() == [0, 0, 2]
    assert type(gate.weights(logits, 0)) is Chosen


def test_forced_at_a_layer_beyond_the_route_raises():
    with pytest.raises(IndexError):
        ForcedGate(torch.tensor([[2, 0]])).weights(torch.zeros(1, 3), 2)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        SoftGate(temperature=temperature)


def test_an_unknown_gate_raises():
    with pytest.raises(UserError, match=f"unknown gate 'top2': there is {', '.join(sorted(GATES))}"):
        make_gate("top2")


def test_the_old_way_to_make_a_gate_names_the_new_one():
    with pytest.raises(TypeError, match=r"write make_gate\('soft', temperature=2.0\), or SoftGate\(2.0\)"):
        Gate("soft", temperature=2.0)


def test_a_gate_is_one_class_and_one_name(monkeypatch):
    class Last(Gate):
        def weights(self, logits, layer):
            return Chosen(torch.full_like(logits[:, 0], logits.shape[1] - 1, dtype=torch.int64))

    monkeypatch.setitem(GATES, "last", Last)
    assert make_gate("last").weights(torch.zeros(2, 3), 0).experts.tolist() == [2, 2]

import pytest
import torch

from advmoe.errors import UserError
from advmoe.moe.dispatch import DISPATCHES, check_dispatch, fastest, run_chosen
from advmoe.moe.experts import FilterBank, mixture, windows

NAMES = [name for name in DISPATCHES if name != "triton"]  # tested in test_triton_conv.py


@pytest.mark.parametrize("dispatch", NAMES)
def test_chosen_by_hand(dispatch):
    # 1x1 filters 1, 10, 100 on one channel; expert 0 has filters 0 and 1, expert 1 has 1 and 2 (filter 2 writes channel 0)
    bank = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1)
    x = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    y = run_chosen(x, FilterBank(bank, (0, 1), 2, 1, dispatch=dispatch), torch.tensor([1, 0, 1]))
    assert y.flatten(1).tolist() == [[100, 10], [2, 20], [300, 30]]


@pytest.mark.parametrize("dispatch", NAMES)
def test_the_hard_gates_gradients_equal_those_of_single_images(dispatch):
    random = torch.Generator().manual_seed(0)
    starts, _, size = windows("backbone", 3, 9, 6)
    x = torch.randn(5, 4, 6, 6, generator=random, dtype=torch.float64, requires_grad=True)
    filters = torch.randn(size, 4, 3, 3, generator=random, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 6, generator=random, dtype=torch.float64, requires_grad=True)
    bank, experts = FilterBank(filters, starts, 6, 2, bias, dispatch), torch.tensor([2, 0, 1, 2, 2])
    output = run_chosen(x, bank, experts)
    expected = torch.cat([bank.convolve(x[b : b + 1], int(e)) for b, e in enumerate(experts)])
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(output.shape, generator=random, dtype=torch.float64)
    gradients, expected_gradients = (torch.autograd.grad((y * weights).sum(), (x, filters, bias)) for y in (output, expected))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dispatch", NAMES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("bank", "num_experts", "width"), [("backbone", 2, 4), ("backbone", 3, 6), ("disjoint", 4, 3), ("disjoint", 1, 5)]
)
def test_one_hot_mixture_and_chosen_agree_in_values_and_every_gradient(bank, num_experts, width, stride, layout, dispatch):
    """Straight-through: every dispatch gives the gradients of the mixture, which runs every expert."""
    random = torch.Generator().manual_seed(num_experts)
    starts, _, size = windows(bank, num_experts, 9, width)

    def noise(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    x = noise(7, 5, 6, 6).contiguous(memory_format=layout).requires_grad_()
    filters, bias = noise(size, 5, 3, 3).requires_grad_(), noise(num_experts, width).requires_grad_()
    experts = torch.randint(0, num_experts, (7,), generator=random)
    one_hot = torch.nn.functional.one_hot(experts, num_experts).double().requires_grad_()
    bank = FilterBank(filters, starts, width, stride, bias, dispatch)
    output, expected = run_chosen(x, bank, experts, one_hot), mixture(x, bank, one_hot)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    weights, inputs = noise(*output.shape), (x, filters, bias, one_hot)
    pairs = zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (output, expected)), strict=True)
    for gradient, expected_gradient in pairs:
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dispatch", NAMES)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_small_batches(batch, dispatch):
    bank = FilterBank(torch.randn(4, 2, 3, 3), (0, 2), 2, 2, dispatch=dispatch)
    y = run_chosen(torch.randn(batch, 2, 6, 6), bank, torch.ones(batch, dtype=torch.int64))
    assert y.shape == (batch, 2, 3, 3)


@pytest.mark.parametrize("dispatch", ["wide", "grouped"])
def test_static_dispatches_read_no_value_on_the_host(dispatch):
    """Tensors on the meta device have no values to read."""
    with torch.device("meta"):
        bank = FilterBank(torch.empty(4, 2, 3, 3), (0, 2), 2, 2, torch.empty(2, 2), dispatch)
        assert run_chosen(torch.empty(6, 2, 8, 8), bank, torch.empty(6, dtype=torch.int64)).shape == (6, 2, 4, 4)


@pytest.mark.parametrize(
    ("learns", "batch", "expected"),
    [
        (False, 1, "split"), (False, 2, "grouped"), (False, 200, "grouped"), (False, 201, "split"),
        (True, 1, "split"), (True, 2, "grouped"), (True, 40, "grouped"), (True, 41, "split"),
    ],
)  # fmt: skip
def test_auto_groups_batches_for_which_few_filter_values_are_copied(learns, batch, expected):
    """An expert of 20 filters of 50 values: 1,000 values are copied for an image, at most 200,000, or 40,000 if filters learn."""
    bank = FilterBank(torch.zeros(40, 50, 1, 1, requires_grad=learns), (0, 20), 20, 1)
    x = torch.empty(batch, 50, 4, 4)
    assert fastest(x, bank) == expected
    assert fastest(x.to(memory_format=torch.channels_last), bank) == "split"
    with torch.no_grad():
        assert fastest(x, bank) == ("grouped" if 1 < batch <= 200 else "split")


def test_a_dispatch_that_does_not_run_on_the_device_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"dispatch 'triton' does not run on cpu here; these do: auto, split, wide, grouped"):
        check_dispatch("triton", torch.device("cpu"))


@pytest.mark.parametrize("dispatch", NAMES)
def test_second_gradients_count_the_path_through_the_router_once(dispatch):
    def penalty(dispatch):
        random = torch.Generator().manual_seed(0)
        x, filters, router = (
            torch.randn(*shape, generator=random, dtype=torch.float64, requires_grad=True)
            for shape in ((3, 2, 4, 4), (4, 2, 3, 3), (2, 2))
        )
        p = (x.mean(dim=(2, 3)) @ router).softmax(dim=1)
        experts = p.argmax(dim=1)
        one_hot = torch.nn.functional.one_hot(experts, 2).double() + p - p.detach()
        y = run_chosen(x, FilterBank(filters, (0, 2), 2, 1, dispatch=dispatch), experts, one_hot)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return gradient, *torch.autograd.grad(gradient.square().sum(), (x, filters, router))

    torch.testing.assert_close(penalty(dispatch), penalty("wide"), rtol=1e-10, atol=1e-10)

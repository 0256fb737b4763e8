import pytest
import torch
from masked_twin import expert_filters, masked
from torch import nn

from advmoe.errors import UserError
from advmoe.moe import HARD, DenseConv2d, DenseKind, ForcedGate, MoEConv2d, MoEKind, ScaledGate, images, make_gate
from advmoe.moe.experts import aligned, windows

IN_CHANNELS, OUT_CHANNELS = 4, 12


def fresh_layer(in_channels, out_channels, width, *, num_experts, bank="backbone", kernel_size=3, stride=1):
    """A routed layer without batch norm."""
    experts = windows(bank, num_experts, out_channels, width)
    return MoEConv2d(images(in_channels), experts, kernel_size=kernel_size, stride=stride, norm=None, routed=True)


def make_layer(num_experts, bank="backbone", width=6, kernel_size=3, stride=1, index=0):
    """A layer in eval mode. Its experts differ, and its router uses several of them."""
    torch.manual_seed(num_experts)
    layer = fresh_layer(
        IN_CHANNELS, OUT_CHANNELS, width, num_experts=num_experts, bank=bank, kernel_size=kernel_size, stride=stride
    ).double()
    layer.index = index
    with torch.no_grad():
        layer.filters.normal_()
        layer.router.linear.weight.normal_()
        layer.router.linear.bias.normal_()
        layer.router.mean.normal_(std=0.1)
        layer.router.var.uniform_(0.5, 2)
    return layer.eval()


def any_gate(kind, batch, num_experts, layers=3):
    if kind != "forced":
        return HARD if kind == "hard" else make_gate(kind, temperature=1.7)
    return ForcedGate(torch.randint(-1, num_experts, (batch, layers)))


def make_images(batch):
    return torch.randn(batch, IN_CHANNELS, 5, 6, dtype=torch.float64, requires_grad=True)


def gradients(y, layer, x):
    """Gradients of a random linear function of y with respect to images, filters and router; None if y does not depend on it."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    inputs = {"x": x, **dict(layer.named_parameters())}
    values = torch.autograd.grad((y * probe).sum(), list(inputs.values()), allow_unused=True)
    return dict(zip(inputs, values, strict=True))


def assert_agrees(layer, bank, x, gate):
    y, (routing,) = layer(x, gate)
    expected_y = masked(layer, bank, OUT_CHANNELS, x, gate)
    torch.testing.assert_close(y, expected_y, rtol=1e-10, atol=1e-11)
    fast_gradients, slow_gradients = gradients(y, layer, x), gradients(expected_y, layer, x)
    for name, gradient in fast_gradients.items():
        expected = slow_gradients[name]
        assert (gradient is None) == (expected is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    return routing, fast_gradients


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(("stride", "kernel_size", "width"), [(1, 3, 5), (2, 3, 10), (2, 1, 2)])
@pytest.mark.parametrize("kind", ["hard", "straight_through", "scaled", "soft", "forced"])
@pytest.mark.parametrize("bank", ["backbone", "disjoint"])
@pytest.mark.parametrize("num_experts", [1, 2, 4, 8])
def test_agrees_with_the_masked_twin(num_experts, bank, kind, stride, kernel_size, width, batch):
    layer = make_layer(num_experts, bank, width, kernel_size, stride, index=1)
    assert_agrees(layer, bank, make_images(batch), any_gate(kind, batch, num_experts))


@pytest.mark.parametrize("kind", ["hard", "straight_through", "scaled", "soft"])
@pytest.mark.parametrize("bank", ["backbone", "disjoint"])
def test_agrees_with_the_masked_twin_if_no_image_chose_an_expert(bank, kind):
    layer = make_layer(4, bank, width=3)
    with torch.no_grad():
        layer.router.linear.bias[2] = 9
    routing, layer_gradients = assert_agrees(layer, bank, make_images(5), make_gate(kind))
    assert routing.experts.tolist() == [2] * 5
    unused = sorted(set(range(len(layer.filters))) - set(expert_filters(bank, 4, OUT_CHANNELS, 3)[2]))
    assert (layer_gradients["filters"][unused] == 0).all() == (kind != "soft")


def test_agrees_with_the_masked_twin_if_an_expert_gets_one_image():
    layer = make_layer(4, width=6)
    assert_agrees(layer, "backbone", make_images(4), ForcedGate(torch.tensor([[3], [0], [3], [3]])))


def test_the_router_gets_a_gradient_from_every_gate_but_hard_and_forced():
    layer, x = make_layer(4), make_images(6)
    for kind in ("hard", "straight_through", "scaled", "soft", "forced"):
        y, _ = layer(x, any_gate(kind, 6, 4))
        gradient = gradients(y, layer, x)["router.linear.weight"]
        if kind in ("hard", "forced"):
            assert gradient is None
        else:
            assert gradient.abs().max() > 1e-3


def test_the_routing_has_the_routers_logits_and_the_expert_that_ran():
    layer, x = make_layer(4), make_images(5)
    _, (hard,) = layer(x, HARD)
    _, (forced,) = layer(x, ForcedGate(torch.tensor([[3], [-1], [0], [2], [1]])))
    assert torch.equal(hard.logits, layer.router(x))
    assert torch.equal(forced.logits, hard.logits)
    assert torch.equal(hard.experts, hard.logits.argmax(dim=1))
    assert forced.experts.tolist() == [3, hard.experts[1].item(), 0, 2, 1]


def test_a_forced_gate_is_read_at_the_layers_index():
    layer, x = make_layer(4, index=2), make_images(2)
    _, (routing,) = layer(x, ForcedGate(torch.tensor([[0, 0, 3], [1, 1, 2]])))
    assert routing.experts.tolist() == [3, 2]


def test_an_images_output_does_not_depend_on_its_batch():
    layer, x = make_layer(4), make_images(9)
    together, (routing,) = layer(x, HARD)
    assert len(routing.experts.unique()) > 1
    for i in range(9):
        alone, (single_routing,) = layer(x[i : i + 1], HARD)
        assert single_routing.experts[0] == routing.experts[i]
        torch.testing.assert_close(alone[0], together[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bank", ["backbone", "disjoint"])
@pytest.mark.parametrize("num_experts", [1, 2, 4, 8])
def test_all_experts_start_equal(num_experts, bank):
    layer = fresh_layer(IN_CHANNELS, OUT_CHANNELS, 5, num_experts=num_experts, bank=bank)
    experts = [aligned(layer.filters, start, 5) for start in layer.starts]
    assert all(torch.equal(expert, experts[0]) for expert in experts)
    assert not torch.equal(experts[0][0], experts[0][1])


def test_fresh_experts_give_the_same_output_on_any_route():
    layer = fresh_layer(IN_CHANNELS, OUT_CHANNELS, 5, num_experts=4).double()
    x = make_images(1)
    outputs = [layer(x, ForcedGate(torch.tensor([[e]])))[0] for e in range(4)]
    assert all(torch.equal(y, outputs[0]) for y in outputs)


def test_filters_are_initialised_like_torchs_convolutions():
    torch.manual_seed(3)
    layer = fresh_layer(8, 32, 16, num_experts=2)
    bound = (1 / (8 * 9)) ** 0.5
    assert layer.filters.abs().max() <= bound
    assert layer.filters.abs().max() > 0.99 * bound


def test_tie_gradients_sums_over_the_filters_of_one_channel():
    layer = fresh_layer(1, 3, 2, num_experts=2, kernel_size=1)
    assert layer.starts == (0, 1)
    layer.filters.grad = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1)  # filters 0 and 2 write channel 0
    layer.tie_gradients()
    assert layer.filters.grad.flatten().tolist() == [101.0, 10.0, 101.0]


def test_tie_gradients_does_nothing_without_gradients():
    layer = fresh_layer(1, 3, 2, num_experts=2, kernel_size=1)
    layer.tie_gradients()
    assert layer.filters.grad is None


def test_dense_convolution_routes_nothing():
    layer = DenseConv2d(images(3), images(4), 3, 1, None)
    x = torch.randn(2, 3, 5, 5)
    y, routings = layer(x, HARD)
    assert routings == ()
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, layer.weight, padding=1), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("scale", "channels", "width"), [(0.2, 64, 12), (0.5, 64, 32), (0.8, 64, 51), (0.2, 15, 3), (0.29, 100, 29), (1.0, 7, 7)]
)
def test_width_is_the_integer_part_of_scale_times_channels(scale, channels, width):
    assert DenseKind(scale).channels(channels).width == width
    assert MoEKind(scale).channels(channels).width == width


def test_kinds_refuse_settings_without_a_network():
    for scale in (0.0, -0.5, 1.1):
        with pytest.raises(UserError, match="model_scale"):
            DenseKind(scale)
        with pytest.raises(UserError, match="model_scale"):
            MoEKind(scale)
    with pytest.raises(UserError, match="num_experts"):
        MoEKind(0.5, num_experts=0)
    with pytest.raises(UserError, match=r"0\.1"):
        DenseKind(0.1).channels(9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_scaled_gate_multiplies_the_output_after_norm_and_bias(norm, training):
    """d/dp_k is <g, norm_k(conv_k(x))>, as under straight-through: the norm does not remove the factor."""
    torch.manual_seed(0)
    kind = MoEKind(0.5, norms="per_expert")
    layer = kind.conv(images(3), kind.channels(8), norm=norm).double().train(training)
    if not norm:
        layer.bias = nn.Parameter(torch.randn(2, 4, dtype=torch.float64))  # of a converted convolution
    x, logits = torch.randn(8, 3, 5, 5, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    layer.router.forward = lambda _: logits
    y, _ = layer(x, ScaledGate())
    weights = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * weights).sum(), logits)
    p, k = logits.softmax(dim=1).max(dim=1)
    expected = p * (1 - p) * (y * weights).sum(dim=(1, 2, 3))
    torch.testing.assert_close(gradient[torch.arange(8), k], expected, rtol=1e-9, atol=1e-9)

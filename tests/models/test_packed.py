"""Convolutions with filters in the library's layout."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from advmoe.models.packed import PackedConv2d

SETTINGS = [
    (3, 8, 3, 1, 1, 1), (8, 12, 3, 2, 1, 1), (8, 8, 1, 1, 0, 1), (8, 16, 1, 2, 0, 1), (1, 1, 3, 1, 1, 1), (6, 4, 3, 1, 1, 2),
    (5, 7, 7, 2, 3, 1), (64, 32, 3, 1, 1, 1),
]  # fmt: skip


def pair(settings, bias=True):
    """A plain convolution and its packed form."""
    torch.manual_seed(0)
    inputs, outputs, size, stride, padding, groups = settings  # as in nn.Conv2d
    plain = nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=bias).requires_grad_(False)
    return plain.to(memory_format=torch.channels_last), packed_copy(plain)


def packed_copy(plain, relu=False):
    packed = PackedConv2d(deepcopy(plain))
    packed.relu = relu
    return packed


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_values_as_a_plain_convolution(settings, bias):
    plain, packed = pair(settings, bias)
    with_relu = packed_copy(plain, relu=True)
    assert packed._packed() is not None
    assert with_relu._packed() is not None
    for batch in (0, 1, 5):
        x = torch.randn(batch, settings[0], 9, 8).contiguous(memory_format=torch.channels_last)
        y = plain(x)
        torch.testing.assert_close(packed(x), y)
        torch.testing.assert_close(packed(x.contiguous()), y)
        torch.testing.assert_close(with_relu(x), y.relu())
        for layout in (torch.channels_last, torch.contiguous_format):
            onto = torch.randn(y.shape).contiguous(memory_format=layout)
            torch.testing.assert_close(packed(x, onto.clone()), onto + y)
            torch.testing.assert_close(with_relu(x, onto.clone()), (onto + y).relu())


def test_the_filters_follow_the_weights():
    plain, packed = pair(SETTINGS[0])
    other = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    assert packed.state_dict().keys() == plain.state_dict().keys()
    copy = deepcopy(packed)
    copy.load_state_dict(other.state_dict())
    torch.testing.assert_close(copy(x), other(x))
    torch.testing.assert_close(packed(x), plain(x))
    torch.testing.assert_close(deepcopy(packed)(x), plain(x))
    torch.testing.assert_close(packed.double()(x.double()), plain.double()(x.double()))
    torch.testing.assert_close(packed.float()(x), plain.float()(x))
    called = torch.func.functional_call(packed, {**other.state_dict()}, (x,))
    torch.testing.assert_close(called, other(x))
    torch.testing.assert_close(packed(x), plain(x))
    packed.weight.mul_(2)
    plain.weight.mul_(2)
    torch.testing.assert_close(packed(x), plain(x))
    packed.weight = other.weight
    plain.weight = other.weight
    torch.testing.assert_close(packed(x), plain(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_autograd_autocast_and_tracers_get_the_plain_convolution():
    plain, packed = pair(SETTINGS[0])
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    ours, theirs = (torch.autograd.grad(layer(x).sin().sum(), x)[0] for layer in (packed, plain))
    torch.testing.assert_close(ours, theirs)

    def residual():
        return x.repeat(1, 3, 1, 1)[:, :8].relu()  # the backward pass of a ReLU needs its output unchanged

    outputs = packed_copy(plain, relu=True)(x, residual()), (plain(x) + residual()).relu()
    ours, theirs = (torch.autograd.grad(y.sin().sum(), x)[0] for y in outputs)
    torch.testing.assert_close(ours, theirs)
    packed.weight.requires_grad_()
    assert packed(x.detach()).requires_grad
    packed.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        first_called_here = packed_copy(plain)
        assert torch.equal(first_called_here(x), plain(x))
        assert packed(x).dtype == torch.bfloat16
    x = x.detach()
    torch.testing.assert_close(first_called_here(x), plain(x))
    assert first_called_here._packed() is not None
    torch.testing.assert_close(packed(x[0]), plain(x[0]))  # one image without a batch
    torch.testing.assert_close(torch.func.vmap(packed)(x[None]), plain(x)[None])
    assert not any("mkldnn" in str(node.target) for node in torch.export.export(packed, (x,)).graph.nodes)
    assert "mkldnn" not in str(torch.jit.trace(packed, x).graph)


def test_tangents_and_torch_fx_pass_through():
    plain, packed = pair(SETTINGS[0])
    x, tangent = torch.randn(2, 2, 3, 8, 8)
    with forward_ad.dual_level():
        for layer in (packed, packed_copy(plain, relu=True)):
            y = layer(forward_ad.make_dual(x, tangent))
            expected = plain(x).relu() if layer.relu else plain(x)
            slope = plain(tangent) - plain(torch.zeros_like(x))
            torch.testing.assert_close(
                tuple(forward_ad.unpack_dual(y)), (expected, slope * (expected > 0) if layer.relu else slope)
            )
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(packed))(x), plain(x))


def test_without_a_correct_operator_the_plain_convolution_runs(monkeypatch):
    plain, _ = pair(SETTINGS[0])
    x = torch.randn(2, 3, 8, 8)
    with monkeypatch.context() as patch:
        patch.setattr(PackedConv2d, "_run", lambda self, packed, x, onto=None: self._plain(x, onto) + 0.01)
        broken = PackedConv2d(plain)
        assert broken._packed() is None
        torch.testing.assert_close(broken(x), plain(x))

    def missing(*_):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_convolution_pointwise'")

    monkeypatch.setattr(PackedConv2d, "_run", missing)
    torch.testing.assert_close(PackedConv2d(plain)(x), plain(x))


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_other_paddings_run_as_plain_convolutions(options):
    plain = nn.Conv2d(3, 8, 3, **options).requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(PackedConv2d(plain)(x), plain(x))
    plain.weight.mul_(1e-4)  # the differences are smaller than what rounding may change
    plain.bias.zero_()
    torch.testing.assert_close(PackedConv2d(plain)(1e4 * x), plain(1e4 * x))


def test_another_default_dtype_or_device_changes_nothing():
    plain, _ = pair(SETTINGS[0])
    x = torch.randn(2, 3, 8, 8)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            packed = PackedConv2d(plain)
            torch.testing.assert_close(packed(x), plain(x))
            assert packed._packed() is not None
    finally:
        torch.set_default_dtype(torch.float32)

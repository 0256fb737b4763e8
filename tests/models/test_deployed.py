"""Networks that only do inference."""

import pytest
import torch
from test_fused import KINDS, NETWORKS, SPEC, random_network
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from advmoe.config import ModelConfig
from advmoe.export.traceable import Traceable
from advmoe.models import build_model, deployed, fused
from advmoe.moe import HARD, DenseKind, ForcedGate, MoEConv2d, MoEKind, Router, SoftGate


@pytest.mark.parametrize(("backbone", "kind"), NETWORKS, ids=str)
@torch.no_grad()
def test_same_logits_and_routes(backbone, kind):
    model = random_network(backbone, kind)
    copy = deployed(model)
    assert model.training
    model.eval()
    random = torch.Generator().manual_seed(1)
    for batch in (1, 6):
        x = torch.rand(batch, *SPEC.shape, dtype=torch.float64, generator=random)
        forced = torch.randint(-1, 2, (batch, max(1, len(model.moe_layers()))), generator=random)
        for gate in (HARD, ForcedGate(forced)):
            expected, results = (network.forward_routed(x, gate) for network in (model, copy))
            torch.testing.assert_close(results[0], expected[0], rtol=1e-9, atol=1e-9)
            for routing, expected_routing in zip(results[1], expected[1], strict=True):
                torch.testing.assert_close(routing.logits, expected_routing.logits, rtol=1e-9, atol=1e-9)
                assert torch.equal(routing.experts, expected_routing.experts)
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert not any(module.training for module in copy.modules())
    assert not any(isinstance(module, Router) for module in copy.modules())


@pytest.mark.parametrize("kind", KINDS[-2:], ids=str)
def test_the_network_does_not_change(kind):
    model = random_network("resnet18", kind)
    deployed(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.inference_mode()
def test_single_precision_gives_the_same_within_rounding(kind):
    """In float32, filters are packed, and sums and activations are part of the convolution."""
    model = random_network("resnet18", kind).float().eval()
    copy = deployed(model)
    random = torch.Generator().manual_seed(1)
    for batch in (0, 1, 7):
        x = torch.rand(batch, *SPEC.shape, generator=random)
        before = x.clone()
        even = torch.randint(0, 2, (batch, max(1, len(model.moe_layers()))), generator=random)
        for route in (even, torch.zeros_like(even), even.sort(dim=0).values):
            expected, given = (network.forward_routed(x, ForcedGate(route)) for network in (model, copy))
            torch.testing.assert_close(given[0], expected[0], rtol=1e-4, atol=1e-5)
            for ours, theirs in zip(given[1], expected[1], strict=True):
                torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
                assert torch.equal(ours.experts, theirs.experts)
        assert torch.equal(x, before)


@pytest.mark.parametrize("kind", [DenseKind(), MoEKind(0.5, 3)], ids=str)
@pytest.mark.parametrize("backbone", ["resnet18", "wrn28_10"])
def test_the_same_gradients_to_the_images(backbone, kind):
    model = fused(random_network(backbone, kind))
    copy = deployed(model)
    random = torch.Generator().manual_seed(1)
    x = torch.rand(6, *SPEC.shape, dtype=torch.float64, generator=random, requires_grad=True)
    gate = ForcedGate(torch.randint(0, 3, (6, max(1, len(model.moe_layers()))), generator=random))
    given, expected = (torch.autograd.grad(n.forward_routed(x, gate)[0].sin().sum(), x)[0] for n in (copy, model))
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("kind", [DenseKind(), MoEKind(0.5, 2)], ids=str)
@pytest.mark.parametrize("same_expert", [True, False])
def test_hooks_on_blocks_see_their_outputs(kind, same_expert):
    """Also after the pass: a later block does not overwrite what an earlier one returned."""
    model = random_network("resnet18", kind).float().eval()
    images = torch.rand(6, *SPEC.shape)
    route = torch.arange(6)[:, None].expand(6, max(1, len(model.moe_layers()))) % (1 if same_expert else 2)
    outputs = []
    for network in (model, deployed(model)):
        maps = []
        for block in network.blocks:
            block.register_forward_hook(lambda module, inputs, output, maps=maps: maps.append(output[0]))
        with torch.inference_mode():
            network.forward_routed(images, ForcedGate(route))
        outputs.append(maps)
    assert len(outputs[1]) == len(model.blocks)
    for expected, given in zip(*outputs, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_routers_stay_float32_under_autocast():
    torch.manual_seed(0)
    model = build_model(ModelConfig(width=8), MoEKind(0.5, 2), SPEC).eval()
    x = torch.rand(4, *SPEC.shape)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        routing = deployed(model).forward_routed(x)[1][0]
        expected = model.forward_routed(x)[1][0]
    assert routing.logits.dtype == torch.float32
    torch.testing.assert_close(routing.logits, expected.logits, rtol=1e-2, atol=1e-3)


def test_half_precision_does_not_overflow_on_large_images():
    """The sum over 256 x 256 positions exceeds the largest number of float16, 65504."""
    torch.manual_seed(0)
    router = Router(3, 2)
    x = torch.rand(2, 3, 256, 256) + 2
    torch.testing.assert_close(router.folded().half()(x.half()).float(), router.eval()(x), rtol=1e-2, atol=1e-2)


class HalvingNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) / 2


class HalvingConv2d(MoEConv2d):
    def forward(self, *inputs):
        y, routings = super().forward(*inputs)
        return y / 2, routings


class OppositeRouter(Router):
    def forward(self, x):
        return -super().forward(x)


def of_another_class(kind, other):
    def change(model):
        for module in model.modules():
            if type(module) is kind:
                module.__class__ = other

    return change


def group_norms(model):
    for layer in model.moe_layers():
        layer.norm = nn.GroupNorm(1, layer.width).double()


def hooks_on_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda norm, inputs, y: y / 2)


def hooks_on_layers(model):
    for layer in model.moe_layers():
        layer.register_forward_hook(lambda layer, inputs, outputs: (outputs[0] / 2, outputs[1]))


@pytest.mark.parametrize(
    "change",
    [
        of_another_class(nn.BatchNorm2d, HalvingNorm), of_another_class(MoEConv2d, HalvingConv2d),
        of_another_class(Router, OppositeRouter), group_norms, hooks_on_norms, hooks_on_layers,
    ],
)  # fmt: skip
@torch.no_grad()
def test_copies_keep_what_a_user_changed(change):
    model = random_network("resnet18", MoEKind(0.5, 3, norms="shared")).eval()
    x = torch.rand(5, *SPEC.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = model(x)
    change(model)
    expected = model(x)
    assert not torch.allclose(expected, before, rtol=1e-2)
    for copy in (fused(model), deployed(model)):
        torch.testing.assert_close(copy(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(Traceable(model)(x.float())[0].double(), expected, rtol=1e-3, atol=1e-3)


def test_gates_that_run_other_experts_are_refused_in_one_line():
    model = deployed(build_model(ModelConfig(width=8), MoEKind(0.5, 2), SPEC))
    with pytest.raises(TypeError, match="hard and forced gates, not gates that return Mixed"):
        model.forward_routed(torch.rand(2, *SPEC.shape), SoftGate())


class Operators(TorchDispatchMode):
    """Counts the operators that reach a device; views and allocations inside them do not count."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("batch", "most"), [(1, 9), (8, 29)])
@torch.no_grad()
def test_a_routed_layer_calls_few_operators(batch, most):
    """With activation and residual sum, N 2. A single image takes 1.3 times as long as in the small dense network."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(width=8), MoEKind(0.5, 2), SPEC)
    copy, layers = deployed(model), len(model.moe_layers())
    route = torch.arange(batch)[:, None].expand(batch, layers) % 2
    x, gate = torch.rand(batch, *SPEC.shape), HARD if batch == 1 else ForcedGate(route)
    copy.forward_routed(x, gate)  # converts the filters
    with Operators() as operators:
        copy.forward_routed(x, gate)
    assert operators.count <= most * layers

"""Networks that only do inference."""

import pytest
import torch
from test_fused import KINDS, SPEC, random_network
from torch.utils._python_dispatch import TorchDispatchMode

from advmoe.config import ModelConfig
from advmoe.models import MODELS, build_model, deployed, fused
from advmoe.moe import HARD, DenseKind, ForcedGate, MoEKind, Router, SoftGate


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("backbone", MODELS)
@torch.no_grad()
def test_same_logits_and_routes(backbone, kind):
    model = random_network(backbone, kind)
    copy = deployed(model)
    assert model.training
    model.eval()
    random = torch.Generator().manual_seed(1)
    for batch in (1, 6):
        x = torch.rand(batch, 3, 16, 16, dtype=torch.float64, generator=random)
        forced = torch.randint(-1, 2, (batch, max(1, len(model.moe_layers()))), generator=random)
        for gate in (HARD, ForcedGate(forced)):
            expected, results = (network.forward_routed(x, gate) for network in (model, copy))
            torch.testing.assert_close(results[0], expected[0], rtol=1e-9, atol=1e-9)
            for routing, expected_routing in zip(results[1], expected[1], strict=True):
                torch.testing.assert_close(routing.logits, expected_routing.logits, rtol=1e-9, atol=1e-9)
                assert torch.equal(routing.experts, expected_routing.experts)
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert not any(isinstance(module, Router) for module in copy.modules())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.inference_mode()
def test_single_precision_gives_the_same_within_rounding(kind):
    """In float32, filters are packed, and sums and activations are part of the convolution."""
    model = random_network("resnet18", kind).float().eval()
    copy = deployed(model)
    random = torch.Generator().manual_seed(1)
    for batch in (0, 1, 7):
        x = torch.rand(batch, 3, 16, 16, generator=random)
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
    x = torch.rand(6, 3, 16, 16, dtype=torch.float64, generator=random, requires_grad=True)
    gate = ForcedGate(torch.randint(0, 3, (6, max(1, len(model.moe_layers()))), generator=random))
    given, expected = (torch.autograd.grad(n.forward_routed(x, gate)[0].sin().sum(), x)[0] for n in (copy, model))
    torch.testing.assert_close(given, expected)


def test_images_move_only_where_the_grouping_changes():
    """A block moves its images three times: both branches at its start, and between its convolutions; the last block, back."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(width=8), MoEKind(0.5, 2), SPEC)
    copy, layers = deployed(model), len(model.moe_layers())
    x, layer = torch.rand(8, *SPEC.shape), torch.arange(layers)
    images = torch.arange(8)[:, None]
    moved = {}
    for name, forced in (
        ("same", images % 2 + 0 * layer),
        ("one expert", 0 * images + 0 * layer),
        ("changing", (images >> layer % 3) % 2),
    ):
        with torch.inference_mode(), Operators() as operators:
            copy.forward_routed(x, ForcedGate(forced))
        moved[name] = operators.moves
    blocks = layers // 2
    assert moved == {"same": 1 + 1 + 1, "one expert": 0, "changing": 1 + 2 * blocks + blocks}


def test_routers_stay_float32_under_autocast():
    torch.manual_seed(0)
    model = build_model(ModelConfig(width=8), MoEKind(0.5, 2), SPEC).eval()
    x = torch.rand(4, *SPEC.shape)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        routing = deployed(model).forward_routed(x)[1][0]
        expected = model.forward_routed(x)[1][0]
    assert routing.logits.dtype == torch.float32
    torch.testing.assert_close(routing.logits, expected.logits, rtol=1e-2, atol=1e-3)


def test_gates_that_run_other_experts_are_refused_in_one_line():
    model = deployed(build_model(ModelConfig(width=8), MoEKind(0.5, 2), SPEC))
    with pytest.raises(TypeError, match="hard and forced gates, not SoftGate"):
        model.forward_routed(torch.rand(2, *SPEC.shape), SoftGate())


class Operators(TorchDispatchMode):
    """Counts the operators that reach a device; views and allocations inside them do not count."""

    count = moves = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        self.moves += function is torch.ops.aten.index_select.default and args[0].dim() == 4
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("batch", "most"), [(1, 9), (8, 28)])
@torch.no_grad()
def test_a_routed_layer_calls_few_operators(batch, most):
    """With activation and residual sum, N 2. A single image takes 1.3 times as long as in the small dense network."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(width=8), MoEKind(0.5, 2), SPEC)
    copy, layers = deployed(model), len(model.moe_layers())
    route = torch.arange(batch)[:, None].expand(batch, layers) % 2
    with Operators() as operators:
        copy.forward_routed(torch.rand(batch, *SPEC.shape), HARD if batch == 1 else ForcedGate(route))
    assert operators.count <= most * layers

"""Networks with their batch norms folded in."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from computed_weights import COMPUTED
from torch import nn
from torch.nn.utils import parametrizations, prune

from advmoe.config import ModelConfig
from advmoe.data import ImageSpec
from advmoe.models import MODELS, build_model, fused
from advmoe.models.fused import fold_routers, refresh
from advmoe.moe import (
    HARD,
    DenseKind,
    ExpertNorm,
    MaskedKind,
    MoEConv2d,
    MoEKind,
    PlainConv2d,
    Router,
    ScaledGate,
    SoftGate,
    StraightThroughGate,
)

SPEC = ImageSpec(("a", "b", "c"), (3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
KINDS = [
    DenseKind(), DenseKind(0.5, activation="silu"), MaskedKind(0.5), MoEKind(0.5, 3, norms="shared"),
    MoEKind(0.75, 3, norms="per_expert", activation="silu"),
    MoEKind(0.5, 2, "disjoint", "per_network", "per_expert"), MoEKind(0.5, 2, routers="per_stage"),
]  # fmt: skip
NETWORKS = [  # densenet121 is densenet40 with more layers
    (backbone, kind) for backbone in MODELS for kind in KINDS if backbone != "densenet121" or kind is KINDS[4]
]
WIDTHS = {"resnet18": 8, "wrn28_10": 20, "vgg16_bn": 8, "densenet40": 4, "densenet121": 4}


def random_network(backbone, kind):
    """A network in float64 and train mode with random norms and masks. Sets the random state to a fixed value."""
    model, state = _random_network(backbone, kind)
    torch.set_rng_state(state)
    return deepcopy(model)


@cache
def _random_network(backbone, kind):
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone=backbone, width=WIDTHS[backbone]), kind, SPEC).double().train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | ExpertNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
        for mask in model.masks:
            nn.init.normal_(mask.scores)
        for layer in model.moe_layers():
            nn.init.normal_(layer.filters, std=0.1)
        model(torch.rand(8, *SPEC.shape, dtype=torch.float64))
    return model, torch.get_rng_state()


@pytest.mark.parametrize(("backbone", "kind"), NETWORKS, ids=str)
def test_same_logits_routes_and_input_gradients(backbone, kind):
    model = random_network(backbone, kind)
    copy = fused(model)
    assert model.training
    model.eval()
    for gate in (HARD, StraightThroughGate(), ScaledGate(), SoftGate(temperature=2.0)):
        results = []
        for network in (model, copy):
            x = torch.rand(6, *SPEC.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
            logits, routings = network.forward_routed(x, gate)
            (gradient,) = torch.autograd.grad(logits.square().sum(), x)
            results.append((logits, gradient, *(routing.experts for routing in routings)))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_fusing_removes_norms_after_convolutions_and_does_not_change_the_original():
    model = random_network("resnet18", MoEKind(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = fused(model)
    assert all(layer.norm is None for layer in copy.modules() if isinstance(layer, PlainConv2d | MoEConv2d))
    assert not any(parameter.requires_grad for parameter in copy.weight_parameters())
    routers = zip(model.router_parameters(), copy.router_parameters(), strict=True)
    assert all(original is fused_parameter for original, fused_parameter in routers)
    assert not copy.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("backbone", "kind"),
    [*(("resnet18", kind) for kind in KINDS), *((backbone, KINDS[4]) for backbone in MODELS if backbone != "resnet18")],
    ids=str,
)
def test_refresh_updates_a_fused_copy_in_place(backbone, kind):
    model = random_network(backbone, kind)
    copy = fused(model)
    before = {name: (value.data_ptr(), value.clone()) for name, value in copy.state_dict().items()}
    with torch.no_grad():
        for value in (*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())):
            value.add_(torch.rand_like(value))
    refresh(copy, model)
    assert copy.state_dict().keys() == before.keys()
    refreshed = copy.state_dict()
    for name, value in fused(model).state_dict().items():
        assert torch.equal(refreshed[name], value), name
        assert refreshed[name].data_ptr() == before[name][0], name
        assert not torch.equal(value, before[name][1]) or name.endswith("num_batches_tracked"), name
    assert all(
        original is fused_parameter
        for original, fused_parameter in zip(model.router_parameters(), copy.router_parameters(), strict=True)
    )
    assert not any(parameter.requires_grad for parameter in copy.weight_parameters())


def test_pruned_and_reparametrised_networks_are_fused_and_do_not_change():
    torch.manual_seed(0)
    model = build_model(ModelConfig(width=4), MoEKind(0.5, 2), SPEC).eval()
    layer = model.moe_layers()[0]
    prune.l1_unstructured(layer, "filters", 0.5)
    prune.l1_unstructured(layer.router.linear, "weight", 0.5)
    parametrizations.weight_norm(model.stem[0])
    parametrizations.spectral_norm(model.classifier)
    model.eval()
    x = torch.rand(4, *SPEC.shape)
    with torch.no_grad():
        expected, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
        torch.testing.assert_close(fused(model)(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x), expected)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
def test_refresh_follows_computed_weights_and_does_not_change_them(name):
    model = random_network("vgg16_bn", MoEKind(0.5, 2)).float()
    for layer in (model.stem, model.classifier, model.moe_layers()[0].router.linear):
        COMPUTED[name](layer)
    copy = fused(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    refresh(copy, model)
    assert model.training
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    for key, value in fused(model).state_dict().items():
        assert torch.equal(copy.state_dict()[key], value), key
    x = torch.rand(4, *SPEC.shape)
    torch.testing.assert_close(copy(x), model.eval()(x), rtol=1e-3, atol=1e-4)
    routers = zip(model.router_parameters(), copy.router_parameters(), strict=True)
    assert all(original is fused_parameter for original, fused_parameter in routers)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if isinstance(kind, MoEKind)], ids=str)
def test_folded_routers_give_the_same_logits_routes_and_input_gradients(kind):
    model = random_network("resnet18", kind).eval()
    copy = fused(model)
    fold_routers(copy)
    assert not any(isinstance(module, Router) for module in copy.modules())
    for gate in (HARD, StraightThroughGate(), SoftGate(temperature=2.0)):
        results = []
        for network in (model, copy):
            x = torch.rand(5, *SPEC.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
            logits, routings = network.forward_routed(x, gate)
            router_logits = torch.cat([routing.logits for routing in routings], dim=1)
            (gradient,) = torch.autograd.grad(logits.square().sum() + router_logits.square().sum(), x)
            results.append((logits, router_logits, gradient))
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)

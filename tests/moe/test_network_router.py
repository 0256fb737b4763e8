import pytest
import torch
from image_specs import image_spec
from torch import nn
from torch.nn.functional import cross_entropy

from advmoe.models.resnet import ResNet
from advmoe.moe import Chosen, ForcedGate, Gate, MoEKind, convert, make_gate
from advmoe.moe.network_router import NetworkRouter

GATES = ["hard", "straight_through", "scaled", "soft"]


def network(norms="shared", num_experts=3):
    """A tiny calibrated network in eval mode. Its experts differ, and its router uses several of them."""
    torch.manual_seed(0)
    kind = MoEKind(0.5, num_experts=num_experts, bank="disjoint", routers="per_network", norms=norms)
    model = ResNet(kind, image_spec(3), blocks=(1, 1), width=4, stem="cifar")
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.filters.normal_(std=0.3)
        for module in model.modules():
            if hasattr(module, "momentum"):
                module.momentum = 1.0
        model.train()(x())
    return model.eval()


def x(count=8):
    return torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", GATES)
def test_the_only_routing_is_the_network_routers(kind):
    model = network()
    _, routings = model.forward_routed(x(), make_gate(kind))
    (routing,) = routings
    logits = model.router(model.normalize(x()))
    assert torch.equal(routing.logits, logits)
    assert torch.equal(routing.experts, logits.argmax(dim=1))
    assert len(routing.experts.unique()) > 1
    assert logits.shape == (8, 3)


@pytest.mark.parametrize("norms", ["shared", "per_expert"])
def test_every_layer_uses_the_network_routers_choice(norms):
    model = network(norms)
    chosen = model.forward_routed(x())[1][0].experts
    alone = [model.forward_routed(x(), ForcedGate(torch.full((8, 1), e)))[0] for e in range(3)]
    expected = torch.stack([alone[e][row] for row, e in enumerate(chosen.tolist())])
    torch.testing.assert_close(model(x()), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1])


class RandomGate(Gate):
    def weights(self, logits, layer):
        return Chosen(torch.randint(logits.shape[1], (len(logits),)))


@torch.no_grad()
def test_a_random_gate_chooses_once_for_all_layers():
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)]
    plain = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    converted = convert(plain, example_input=x(), kind=MoEKind(1.0, 3, routers="per_network")).eval()
    for layer in converted.moe_layers():
        layer.filters.normal_()
    for model in (network(), converted):
        logits, (routing,) = model.forward_routed(x(), RandomGate())
        torch.testing.assert_close(logits, model.forward_routed(x(), ForcedGate(routing.experts[:, None]))[0])


def test_layers_get_the_logits_and_have_no_routers():
    model, layer_logits = network(), []
    for layer in model.moe_layers():
        assert layer.router is None
        assert layer.index == 0
        layer.register_forward_pre_hook(lambda _, inputs: layer_logits.append(inputs[2]))
    logits = model.forward_routed(x())[1][0].logits
    assert len(layer_logits) == 4
    assert all(torch.equal(inputs, logits) for inputs in layer_logits)


def test_a_forced_route_has_one_column_where_minus_one_is_the_routers_choice():
    model = network()
    chosen = model.forward_routed(x(4))[1][0].experts
    forced = torch.tensor([[2], [-1], [0], [1]])
    _, (routing,) = model.forward_routed(x(4), ForcedGate(forced))
    assert routing.experts.tolist() == [2, chosen[1].item(), 0, 1]
    logits = model.forward_routed(x(4), ForcedGate(torch.full((4, 1), -1)))[0]
    torch.testing.assert_close(logits, model(x(4)), rtol=0, atol=0)


def test_router_parameters_are_the_network_routers():
    model = network()
    router = {id(parameter) for parameter in model.router.parameters()}
    assert {id(parameter) for parameter in model.router_parameters()} == router
    assert not router & {id(parameter) for parameter in model.weight_parameters()}
    assert len(router) + len(model.weight_parameters()) == len(list(model.parameters()))


@pytest.mark.parametrize("norms", ["shared", "per_expert"])
@pytest.mark.parametrize("kind", GATES)
def test_gradients_reach_the_router_through_all_gates_but_hard(kind, norms):
    model = network(norms)
    logits, _ = model.forward_routed(x(), make_gate(kind))
    cross_entropy(logits, torch.arange(8) % 3).backward()
    gradients = [parameter.grad for parameter in model.router_parameters()]
    if kind == "hard":
        assert all(gradient is None for gradient in gradients)
    else:
        assert all(torch.isfinite(gradient).all() and gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    ("stem", "sides"), [("cifar", [32, 32, 32, 16, 16, 16, 8, 8, 8]), ("imagenet", [8, 8, 8, 4, 4, 4, 2, 2, 2])]
)
def test_the_routers_stages_have_these_channels_and_sides(stem, sides):
    router = NetworkRouter(3, 2, stem).eval()
    h, shapes = router.stem(torch.rand(2, 3, 32, 32)), []
    for block in router.blocks:
        h = block(h)
        shapes.append((h.shape[1], h.shape[2]))
    assert shapes == list(zip([16] * 3 + [32] * 3 + [64] * 3, sides, strict=True))


def test_an_images_choice_does_not_depend_on_its_batch():
    model = network()
    together = model.forward_routed(x())[1][0].logits
    for i in range(8):
        torch.testing.assert_close(model.forward_routed(x()[i : i + 1])[1][0].logits[0], together[i], rtol=1e-4, atol=1e-5)

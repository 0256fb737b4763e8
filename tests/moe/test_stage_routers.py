"""Routers that the layers of a stage share."""

import pytest
import torch
from image_specs import image_spec
from small_backbone import SMALL, SMALL_RESNET

from advmoe.models import MODELS
from advmoe.moe import Chosen, ForcedGate, Gate, MoEKind, check_routings, make_gate

IN_STAGES = {SMALL_RESNET: [2, 2], SMALL: [1, 1, 1, 1, 1], "densenet40": [12, 12, 12]}


def network(backbone=SMALL_RESNET):
    """A tiny network in eval mode. Its experts differ, and its routers use several of them."""
    torch.manual_seed(0)
    make, _ = MODELS[backbone]
    model = make(MoEKind(0.5, num_experts=3, bank="disjoint", routers="per_stage"), image_spec(3), width=4, stem="cifar")
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.filters.normal_(std=0.3)
        for module in model.modules():
            if hasattr(module, "momentum"):
                module.momentum = 1.0
        model.train()(x(64))
    return model.eval()


def x(count=8):
    return torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backbone", IN_STAGES)
@torch.no_grad()
def test_the_layers_of_a_stage_get_the_logits_of_its_router_and_have_no_routers(backbone):
    model, seen, stages = network(backbone), [], []
    for router in model.stage_routers:
        router.register_forward_hook(lambda router, inputs, logits: stages.append(logits))
    for layer in model.moe_layers():
        assert layer.router is None
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    _, routings = model.forward_routed(x())
    assert len(stages) == len(IN_STAGES[backbone])
    expected = [logits for logits, count in zip(stages, IN_STAGES[backbone], strict=True) for _ in range(count)]
    assert all(torch.equal(logits, other) for logits, other in zip(seen, expected, strict=True))
    assert all(torch.equal(routing.logits, logits) for routing, logits in zip(routings, stages, strict=True))
    assert max(len(routing.experts.unique()) for routing in routings) > 1
    check_routings(model, x(1))


@torch.no_grad()
def test_a_router_sees_the_input_of_its_stage():
    model, inputs = network(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    _, routings = model.forward_routed(x())
    for router, of_stage, routing in zip(model.stage_routers, inputs, routings, strict=True):
        assert torch.equal(router(of_stage), routing.logits)


class RandomGate(Gate):
    def weights(self, logits, layer):
        return Chosen(torch.randint(logits.shape[1], (len(logits),)))


@torch.no_grad()
def test_a_random_gate_chooses_once_for_each_stage():
    model = network()
    logits, routings = model.forward_routed(x(), RandomGate())
    route = torch.stack([routing.experts for routing in routings], dim=1)
    assert not torch.equal(route[:, 0], route[:, 1])
    torch.testing.assert_close(logits, model.forward_routed(x(), ForcedGate(route))[0])


@torch.no_grad()
def test_a_forced_route_has_a_column_for_each_stage():
    model = network()
    _, (first, second) = model.forward_routed(x(2), ForcedGate(torch.tensor([[2, -1], [0, 1]])))
    assert first.experts.tolist() == [2, 0]
    assert second.experts.tolist() == [second.logits[0].argmax().item(), 1]
    logits = model.forward_routed(x(2), ForcedGate(torch.full((2, 2), -1)))[0]
    torch.testing.assert_close(logits, model(x(2)), rtol=0, atol=0)


@pytest.mark.parametrize("gate", ["straight_through", "scaled", "soft"])
def test_gradients_reach_the_routers_which_are_the_router_parameters(gate):
    model = network()
    model.forward_routed(x(), make_gate(gate))[0].square().sum().backward()
    assert [id(parameter) for parameter in model.router_parameters()] == [id(p) for p in model.stage_routers.parameters()]
    assert all(parameter.grad.abs().max() > 0 for parameter in model.router_parameters())
    assert len(model.router_parameters()) + len(model.weight_parameters()) == len(list(model.parameters()))

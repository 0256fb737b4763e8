"""Other people's tools on a routed network: gradients of gradients and torch.func work, tracing is refused in one line."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vmap
from torch.optim.swa_utils import AveragedModel

from advmoe.config import ModelConfig
from advmoe.data.fashion_mnist import SPEC
from advmoe.models import build_model
from advmoe.moe import DISPATCHES, HARD, ExpertNorm, MoEKind, StraightThroughGate, update_norms

X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NAMES = [name for name in DISPATCHES if name != "triton"]


def network(dispatch="auto", **kind):
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone="resnet18", width=4), MoEKind(**kind), SPEC).double()
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.filters.add_(0.1 * torch.randn_like(layer.filters))
            layer.router.mean.copy_(0.5 * torch.rand_like(layer.router.mean))
    model.set_dispatch(dispatch)
    return model.eval()


def penalty(model, gate=None):
    """The gradients of a gradient penalty, to the images and every parameter."""
    x = X.double().requires_grad_()
    logits = model(x) if gate is None else model.forward_routed(x, gate)[0]
    (slope,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
    wanted = [x, *model.parameters()]
    return torch.autograd.grad(slope.square().sum(), wanted, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("training", [False, True])
def test_gradient_penalties_agree_in_every_dispatch(training):
    found = {name: penalty(network(name).train(training)) for name in NAMES}
    assert found["wide"][0].abs().max() > 0
    for name in NAMES:
        torch.testing.assert_close(found[name], found["wide"], rtol=1e-8, atol=1e-8)


def test_gradient_penalties_go_through_the_straight_through_gate_too():
    gate = StraightThroughGate()
    found = {name: penalty(network(name, norms="shared"), gate) for name in NAMES}
    for name in NAMES:
        torch.testing.assert_close(found[name], found["wide"], rtol=1e-8, atol=1e-8)


def test_an_expert_norms_second_gradients_are_right():
    norm = ExpertNorm(2, 3).double()
    experts, y = torch.tensor([0, 1, 0, 0]), torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    parameters = tuple(torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def normalised(y, weight, bias):
        return functional_call(norm, {"weight": weight, "bias": bias}, (y, experts))

    assert torch.autograd.gradcheck(normalised, (y, *parameters))
    assert torch.autograd.gradgradcheck(normalised, (y, *parameters))


def test_torch_func_agrees_with_autograd():
    model, x = network(), X.double()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf).sum(), leaf)
    torch.testing.assert_close(grad(lambda x: model(x).sum())(x), expected)
    torch.testing.assert_close(jacrev(lambda x: model(x[None])[0])(x[0]).sum(dim=0), expected[0])
    torch.testing.assert_close(vmap(lambda x: model(x[None])[0])(x), model(x))
    torch.testing.assert_close(vmap(grad(lambda x: model(x[None]).sum()))(x), expected)


def test_what_torch_func_cannot_do_is_named():
    model, x = network("split"), X.double()
    with pytest.raises(RuntimeError, match=r"dispatch 'split' cannot run inside torch.func transforms; .*'wide' can"):
        grad(lambda x: model(x).sum())(x)
    layer = model.moe_layers()[0].train()
    with pytest.raises(RuntimeError, match=r"cannot update the running statistics of .* call model.eval"):
        grad(lambda h: layer(h, HARD)[0].sum())(torch.rand(2, layer.in_channels, 4, 4, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore")
def test_tracing_is_refused_with_the_command_that_exports():
    model, x = network(), X.double()
    tools = {
        "torch.jit.trace": lambda: torch.jit.trace(model, x),
        "legacy torch.onnx.export": lambda: torch.onnx.export(model, (x,), "/dev/null", dynamo=False),
        "torch.export": lambda: torch.export.export(network("split"), (x,)),
        "torch.fx": lambda: torch.fx.symbolic_trace(model),
    }
    for name, call in tools.items():
        with pytest.raises(RuntimeError, match=f"{name} .*advmoe export RUN --out FILE"):
            call()


def test_update_norms_is_the_mean_over_all_batches():
    model, batches = network(), [X.double(), 1 - X.double()]
    averaged = AveragedModel(model)
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, ExpertNorm | torch.nn.BatchNorm2d)):
            norm.running_mean.fill_(9.0)
        stem = model.stem[0]
        outputs = [torch.nn.functional.conv2d(model.normalize(batch), stem.weight, padding=1) for batch in batches]
    update_norms(averaged, batches)
    update_norms(model, iter(batches))
    torch.testing.assert_close(stem.norm.running_mean, torch.cat(outputs).mean(dim=(0, 2, 3)))
    first = model.moe_layers()[0]
    seen = first.norm.batches[:, 0] > 0
    assert seen.any()
    assert (first.norm.running_mean[seen].abs().amax(dim=1) < 9).all()
    assert (first.norm.momentum, stem.norm.momentum, model.training, first.router.batches.item()) == (0.1, 0.1, False, 2)
    for ours, theirs in zip(model.buffers(), averaged.module.buffers(), strict=True):
        assert torch.equal(ours, theirs)

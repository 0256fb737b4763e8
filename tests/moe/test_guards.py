"""Tools of torch on a routed network: second gradients, torch.func and torch.export work, other tracing is refused in one line."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.optim.swa_utils import AveragedModel, update_bn

from advmoe.config import ModelConfig
from advmoe.data.fashion_mnist import SPEC
from advmoe.models import build_model, deployed
from advmoe.moe import DISPATCHES, HARD, ExpertNorm, MoEKind, StraightThroughGate, convert, update_norms

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
    """The gradients of a gradient penalty with respect to the images and every parameter."""
    x = X.double().requires_grad_()
    logits = model(x) if gate is None else model.forward_routed(x, gate)[0]
    (gradient,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
    inputs = [x, *model.parameters()]
    return torch.autograd.grad(gradient.square().sum(), inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("training", [False, True])
def test_gradient_penalties_agree_in_every_dispatch(training):
    gradients = {name: penalty(network(name).train(training)) for name in NAMES}
    assert gradients["wide"][0].abs().max() > 0
    for name in NAMES:
        torch.testing.assert_close(gradients[name], gradients["wide"], rtol=1e-8, atol=1e-8)


def test_gradient_penalties_agree_under_the_straight_through_gate():
    gate = StraightThroughGate()
    gradients = {name: penalty(network(name, norms="shared"), gate) for name in NAMES}
    for name in NAMES:
        torch.testing.assert_close(gradients[name], gradients["wide"], rtol=1e-8, atol=1e-8)


def test_an_expert_norms_second_gradients_are_correct():
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


def test_unsupported_torch_func_transforms_are_refused_with_the_reason():
    model, x = network("split"), X.double()
    with pytest.raises(RuntimeError, match=r"dispatch 'split' cannot run inside torch.func transforms; .*'wide' can"):
        grad(lambda x: model(x).sum())(x)
    with pytest.raises(RuntimeError, match=r"cannot update the running statistics of .* call model.eval"):
        grad(lambda x: model.train()(x).sum())(x)  # the stem's batch norm comes first
    layer = model.moe_layers()[0].train()
    with pytest.raises(RuntimeError, match=r"cannot update the running statistics of .* call model.eval"):
        grad(lambda h: layer(h, HARD)[0].sum())(torch.rand(2, layer.in_channels, 4, 4, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore")
def test_tracing_is_refused_with_a_hint_at_the_export_command():
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


@pytest.mark.parametrize("kind", [{}, {"num_experts": 3, "bank": "disjoint", "norms": "shared"}], ids=str)
def test_torch_export_keeps_the_routing_for_any_number_of_images(kind):
    model, x = network(**kind), torch.rand(7, 1, 8, 8, dtype=torch.float64).pow(torch.logspace(-1, 1, 7)[:, None, None, None])
    program = torch.export.export(model, (x[:2],), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}}).module()
    routes = torch.stack([routing.experts for routing in model.forward_routed(x)[1]], dim=1)
    assert len(routes.unique(dim=0)) > 1
    for images in (x, x[:1]):
        torch.testing.assert_close(program(images), model(images))


@pytest.mark.filterwarnings("ignore")
def test_a_deployed_network_refuses_the_same_tools():
    model, x = deployed(network()), X.double()
    tools = {
        "torch.jit.trace": lambda: torch.jit.trace(model, x),
        "torch.export": lambda: torch.export.export(model, (x,)),
        "torch.fx": lambda: torch.fx.symbolic_trace(model),
    }
    for name, call in tools.items():
        with pytest.raises(RuntimeError, match=f"{name} .*advmoe export RUN --out FILE"):
            call()
    for transform in (grad, vmap):
        with pytest.raises(RuntimeError, match=r"a deployed network cannot run inside torch.func transforms; the network .* can"):
            transform(lambda x: model(x[None]).sum())(x if transform is vmap else x[0])


def test_update_norms_is_the_mean_over_all_batches():
    model, batches = network(), [X.double(), 1 - X.double()]
    averaged = AveragedModel(model)
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, ExpertNorm | torch.nn.BatchNorm2d)):
            norm.running_mean.fill_(9.0)
        stem = model.stem[0]
        outputs = [torch.nn.functional.conv2d(model.normalize(batch), stem.weight, padding=1) for batch in batches]
    update_norms(averaged, batches)
    update_norms(model, ((batch, torch.zeros(len(batch))) for batch in batches))  # as a loader for update_bn gives them
    torch.testing.assert_close(stem.norm.running_mean, torch.cat(outputs).mean(dim=(0, 2, 3)))
    layer = model.moe_layers()[0]
    has_images = layer.norm.batches[:, 0] > 0
    assert has_images.any()
    assert (layer.norm.running_mean[has_images].abs().amax(dim=1) < 9).all()
    assert (layer.norm.momentum, stem.norm.momentum, model.training, layer.router.batches.item()) == (0.1, 0.1, False, 2)
    for ours, theirs in zip(model.buffers(), averaged.module.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def converted():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    plain = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return convert(plain, kind=MoEKind(1.0), example_input=X).double()


def test_a_converted_network_under_torch_func():
    """In eval mode transforms work; in train mode they are refused in one line, and functional_call works."""
    model, x = converted(), X.double()

    def total(x):
        return model(x[None]).sum()

    transforms = {
        "grad": lambda: grad(total)(x[0]),
        "vmap": lambda: vmap(total)(x),
        "jacrev": lambda: jacrev(total)(x[0]),
        "jvp": lambda: jvp(total, (x[0],), (torch.ones_like(x[0]),))[1],
    }
    model.train()
    for call in transforms.values():
        with pytest.raises(RuntimeError, match=r"running statistics .* in train mode: call model\.eval\(\)"):
            call()
    parameters = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    functional_call(model, parameters, (x,)).square().sum().backward()
    assert all(tensor.grad is not None for name, tensor in parameters.items() if "router" not in name)
    model.eval()
    gradient = transforms["grad"]()
    torch.testing.assert_close(transforms["vmap"](), torch.stack([total(image) for image in x]))
    torch.testing.assert_close(transforms["jacrev"](), gradient)
    torch.testing.assert_close(transforms["jvp"](), gradient.sum())


class OneExpert(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = ExpertNorm(1, 2)

    def forward(self, x):
        return self.norm(x, torch.zeros(len(x), dtype=torch.int64))


def test_update_bn_treats_an_expert_norm_like_a_batch_norm():
    batches = [torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    ours, theirs = OneExpert().train(), nn.BatchNorm2d(2).train()
    for model in (ours, theirs):
        model(batches[0])
        update_bn(batches[1:], model)
    assert (
        (ours.norm.momentum, ours.norm.num_batches_tracked.item())
        == (0.1, 2)
        == (theirs.momentum, theirs.num_batches_tracked.item())
    )
    torch.testing.assert_close(ours.norm.running_mean[0], theirs.running_mean)
    torch.testing.assert_close(ours.norm.running_var[0], theirs.running_var)


def test_sync_batch_norm_does_not_replace_an_expert_norm():
    with pytest.raises(AttributeError, match=r"ExpertNorm has .*SyncBatchNorm, cannot replace it; advmoe\.moe\.synchronise"):
        nn.SyncBatchNorm.convert_sync_batchnorm(OneExpert())

"""Plain networks in their MoE form, compared with the plain networks and with slow twins."""

import copy
import math
import re
from unittest.mock import patch

import pytest
import torch
from masked_twin import expert_filters, gate_weights, router_logits
from plain_networks import NETWORKS, LeNet, images, make_network
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import conv2d

from advmoe.attacks import BatchDraws
from advmoe.config import AttackConfig, RunConfig, TrainingConfig
from advmoe.errors import UserError
from advmoe.models import fused
from advmoe.moe import (
    HARD,
    DenseKind,
    ForcedGate,
    MaskedKind,
    MoEConv2d,
    MoEKind,
    Routing,
    SoftGate,
    StraightThroughGate,
    convert,
)  # fmt: skip
from advmoe.training.losses import LOSSES
from advmoe.training.methods import LEVELS
from advmoe.training.steps import TrainState, single_level, two_level

CLASSES = 5
GATES = [HARD, StraightThroughGate(), SoftGate(temperature=2.0)]


def converted(name, num_experts=2, model_scale=0.5, different=True):
    """The MoE form of a network. If `different`, its experts and norms differ and its routers are calibrated."""
    model = convert(make_network(name), num_experts, model_scale, example_input=images(1))
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.moe_layers():
            parameters = (
                [layer.filters, layer.bias] if layer.norm is None else [layer.filters, layer.norm.weight, layer.norm.running_mean]
            )
            for parameter in parameters if different else []:
                if parameter is not None:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            layer.router.train(different)  # statistics of these images
        model(images())
    return model.eval()


def logits_and_gradient(network, x):
    """Logits, and their gradient with respect to the images."""
    x = x.clone().requires_grad_()
    logits = network(x)
    return logits, torch.autograd.grad(logits.square().sum(), x)[0]


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_at_scale_one_the_moe_form_equals_the_model(name, num_experts):
    model = converted(name, num_experts, 1.0, different=False)
    torch.testing.assert_close(
        logits_and_gradient(model, images()), logits_and_gradient(make_network(name), images()), rtol=1e-9, atol=1e-9
    )


def masked(plain, model, scale):
    """A slow twin: the plain network with the dropped channels at zero, and layers with fewer inputs scaled up."""
    masks = {}  # by layer, [C]

    def dropped(name):
        def hook(module, inputs, out):
            dims = [1] * (out.ndim - 2)
            if name not in masks:  # in a first pass, 1 flows through live channels and 0 through dropped ones
                if isinstance(module, nn.Conv2d | nn.Linear):
                    num_kept = out.shape[1] if out.shape[1] in (1, 3, CLASSES) else int(scale * out.shape[1])
                    masks[name] = torch.arange(out.shape[1]) < num_kept
                else:
                    masks[name] = inputs[0].transpose(0, 1).flatten(1).ne(0).any(dim=1)
                return masks[name].to(out).view(1, -1, *dims).expand_as(out).clone()
            if isinstance(module, nn.Conv2d | nn.Linear):
                bias = 0 if module.bias is None else module.bias.view(1, -1, *dims)
                out = (out - bias) * math.sqrt(inputs[0].shape[1] / num_inputs(model.traced.get_submodule(name))) + bias
            return out * masks[name].to(out).view(1, -1, *dims)

        return hook

    for name, module in plain.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.BatchNorm1d):
            module.register_forward_hook(dropped(name))
    plain(images())
    return plain


def num_inputs(layer):
    """The number of inputs of a narrow layer."""
    return (layer.filters if isinstance(layer, MoEConv2d) else layer.weight).shape[1]


@pytest.mark.parametrize("scale", [0.5, 0.3])
@pytest.mark.parametrize("name", NETWORKS)
def test_below_scale_one_the_moe_form_equals_the_model_without_the_dropped_channels(name, scale):
    model = converted(name, 2, scale, different=False)
    twin = masked(make_network(name), model, scale)
    torch.testing.assert_close(logits_and_gradient(model, images()), logits_and_gradient(twin, images()), rtol=1e-9, atol=1e-9)
    plain = sum(parameter.numel() for parameter in make_network(name).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) < plain


class SlowConv(nn.Module):
    """A separate convolution, bias and norm for each expert, whose outputs are weighted and summed."""

    def __init__(self, layer, out_channels):
        super().__init__()
        self.layer, self.out_channels = layer, out_channels

    def forward(self, x, gate, logits=None):
        layer, y = self.layer, 0
        logits = router_logits(layer, x)
        weights = gate_weights(logits, gate, layer.index)
        for e, rows in enumerate(expert_filters("backbone", layer.num_experts, self.out_channels, layer.width)):
            part = conv2d(x, layer.filters[rows], None, layer.stride, layer.filters.shape[-1] // 2)
            if layer.bias is not None:
                part = part + layer.bias[e][:, None, None]
            if layer.norm is not None:
                norm = layer.norm
                part = F.batch_norm(part, norm.running_mean[e], norm.running_var[e], norm.weight[e], norm.bias[e], eps=norm.eps)
            y = y + weights[:, e, None, None, None] * part
        return y, (Routing(logits, logits.argmax(dim=1)),)


def slow_twin(name, model):
    """The same network with slow MoE layers. It shares the parameters of `model`."""
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for name_of_layer in NETWORKS[name][1]:
        out_channels = make_network(name).get_submodule(name_of_layer).out_channels
        twin.traced.set_submodule(name_of_layer, SlowConv(twin.traced.get_submodule(name_of_layer), out_channels))
    return twin


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients_equal_the_slow_twins(name, gate):
    model = converted(name, num_experts=3).eval()
    results = []
    for network in (model, slow_twin(name, model)):
        x = images().requires_grad_()
        logits, routings = network.forward_routed(x, gate)
        loss = logits.square().sum() + sum(routing.logits.square().sum() for routing in routings)
        gradients = torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True)
        results.append((logits, *(routing.experts for routing in routings), *(0 if g is None else g for g in gradients)))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)
    chosen = torch.stack(results[0][1 : 1 + len(NETWORKS[name][1])])
    assert any(len(row.unique()) > 1 for row in chosen)  # a batch uses several experts


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_larger_than_1x1_but_the_first_is_routed_in_call_order(name):
    model, expected = converted(name), NETWORKS[name][1]
    layers = [model.traced.get_submodule(path) for path in expected]
    assert model.moe_layers() == layers
    assert [layer.index for layer in layers] == list(range(len(expected)))
    assert {path for path, module in model.traced.named_modules() if isinstance(module, MoEConv2d)} == set(expected)
    calls = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    _, routings = model.forward_routed(images())
    assert calls == layers
    assert len(routings) == len(layers)
    route = torch.arange(6 * len(layers)).view(6, -1) % 2
    forced = model.forward_routed(images(), ForcedGate(route))[1]
    assert torch.equal(torch.stack([routing.experts for routing in forced], dim=1), route)


class Interleaved(nn.Module):
    """One list's convolutions are called before and after the other list's."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.outer = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.inner = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1)])

    def forward(self, x):
        h = self.outer[0](self.inner[0](self.outer[1](self.stem(x))))
        return self.head(h.mean((2, 3)))


def test_layers_of_two_lists_are_in_call_order():
    model = convert(Interleaved(), example_input=torch.rand(1, 3, 16, 16))
    layers = [model.traced.get_submodule(path) for path in ("outer.1", "inner.0", "outer.0")]
    assert model.moe_layers() == layers
    route = torch.tensor([[0, 1, 0], [1, 0, 0]])
    experts = [routing.experts for routing in model.forward_routed(torch.rand(2, 3, 16, 16), ForcedGate(route))[1]]
    assert torch.equal(torch.stack(experts, dim=1), route)


def test_widths_follow_the_model_scale():
    model = convert(make_network("densenet"), model_scale=0.3, example_input=images(1)).traced
    # stem int(2.4), growth int(1.2) and transition int(3.0) of 8, 4 and 10; the first norm behind two joins reads 2 + 1
    assert [tuple(conv.filters.shape[:2]) for conv in model.convs.children()] == [(2, 2), (2, 3), (2, 3), (2, 4)]
    assert tuple(model.stem.weight.shape[:2]) == (2, 3)
    assert tuple(model.transition.weight.shape[:2]) == (3, 4)
    assert [norm.num_features for norm in model.norms.children()] == [2, 3, 3, 4]
    assert (model.last.num_features, tuple(model.head.weight.shape)) == (5, (5, 5))


def test_norms_after_moe_layers_become_expert_norms_and_the_others_stay():
    model = converted("resnet").traced.network
    assert not hasattr(model.stages.get_submodule("0"), "norm2")
    assert model.stages.get_submodule("0").conv2.norm.eps == 1e-3
    assert isinstance(model.stages.get_submodule("0").norm1, nn.BatchNorm2d)
    assert converted("densenet").moe_layers()[0].norm is None
    assert converted("lenet").moe_layers()[0].bias.shape == (2, 8)


@pytest.mark.parametrize("norms", ["shared", "per_expert"])
def test_plain_averages_of_a_norm_continue_in_its_expert_norms(norms):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8, momentum=None)
    model = between_convolutions(lambda layers, h: h)
    model = nn.Sequential(model.first, model.second, norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head)
    for _ in range(9):
        model.train()(torch.rand(4, 3, 8, 8))
    moe = convert(model, kind=MoEKind(1.0, 1, norms=norms), example_input=torch.rand(1, 3, 8, 8)).train()
    x = torch.rand(4, 3, 8, 8)
    model(x)
    moe(x)
    (layer,) = moe.moe_layers()
    torch.testing.assert_close(layer.norm.running_mean.flatten(), norm.running_mean - model[1].bias)
    torch.testing.assert_close(layer.norm.running_var.flatten(), norm.running_var)


def test_converting_does_not_change_the_model():
    model = make_network("resnet").train()
    before = copy.deepcopy(model.state_dict())
    moe = convert(model, example_input=images(1))
    assert moe.training
    assert model.training
    moe.forward_routed(images())
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not convert(model.eval(), example_input=images(1)).training


@pytest.mark.parametrize("plain", [["network.7"], "network.7"])
def test_layers_named_plain_are_narrowed_and_not_routed(plain):
    model = convert(make_network("vgg"), example_input=images(1), plain=plain)
    assert len(model.moe_layers()) == 2
    assert tuple(model.traced.network.get_submodule("7").weight.shape) == (8, 8, 3, 3)


@pytest.mark.parametrize("name", ["vgg", "resnet", "squeezenet"])
def test_loaded_fused_and_copied_networks_agree(name):
    model = converted(name).eval()
    other = convert(make_network(name), example_input=images(1))
    other.load_state_dict(model.state_dict())
    expected = model.forward_routed(images())
    for network in (other, fused(model), copy.deepcopy(model)):
        torch.testing.assert_close(network.forward_routed(images()), expected, rtol=1e-9, atol=1e-9)
    assert all(layer.norm is None for layer in fused(model).moe_layers())


BATCHES = {
    level: (images().float().roll(turn, 0), torch.arange(6).roll(turn) % CLASSES)
    for turn, level in enumerate(("routers", "weights", "all"))
}


def train_state(name, levels):
    """A calibrated float32 network and its optimizers."""
    model = converted(name).float()
    with torch.no_grad():
        model.train()(BATCHES["all"][0])
    config = RunConfig(attack=AttackConfig(num_steps=2), training=TrainingConfig(lr=0.05, router_lr=0.05))
    optimizers = {level: torch.optim.SGD(LEVELS[level](model), 0.05) for level in levels}
    draws = BatchDraws(torch.Generator().manual_seed(0))
    return TrainState(model.eval(), config, LOSSES["trades"], optimizers, draws, None, 1.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_level_training_changes_the_routers_and_the_weights(name):
    state = train_state(name, ("routers", "weights"))
    before = {key: parameter.detach().clone() for key, parameter in state.model.named_parameters()}
    metrics = two_level(state, BATCHES)
    assert metrics["load"].shape == (len(NETWORKS[name][1]), 2)
    assert torch.isfinite(metrics["loss"])
    unchanged = {key for key, parameter in state.model.named_parameters() if torch.equal(before[key], parameter)}
    routers = {key for key in before if ".router." in key}
    assert not unchanged & routers
    assert not {key for key in unchanged - routers if "filters" in key or key.endswith("conv1.weight")}


def test_training_lowers_the_loss():
    state = train_state("resnet", ("all",))
    losses = [single_level(state, {"all": BATCHES["all"]})["loss"].item() for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


class Model(nn.Module):
    """A convolution, then the forward under test, which may use `layers`."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.layers = nn.ModuleDict(layers)
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))
        self.middle = forward

    def forward(self, x):
        h = self.conv(self.stem(x))
        return self.head(self.middle(self, h).mean((2, 3)))


def with_conv(**settings):
    """A model whose second convolution is built with `settings`."""
    conv = nn.Conv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1, **settings})
    return Model(lambda self, h: self.layers["x"](h), x=conv)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Strange(nn.Conv2d):
    pass


REFUSED = {
    "layers.x: has 8 groups": with_conv(groups=8),
    "layers.x: a kernel of 3x1": with_conv(kernel_size=(3, 1), padding=(1, 0)),
    "layers.x: a kernel of 2x2": with_conv(kernel_size=2),
    "layers.x: strides 1 and 2": with_conv(stride=(1, 2)),
    "layers.x: dilation 2": with_conv(dilation=2, padding=2),
    "layers.x: padding_mode reflect": with_conv(padding_mode="reflect"),
    "layers.x: padding (0, 0), where an MoE layer of kernel 3 has 1 (plain=['layers.x']": with_conv(padding=0),
    "layers.x: padding valid": with_conv(padding="valid"),
    "layers.x: GroupNorm is not a layer": Model(lambda self, h: self.layers["x"](h), x=nn.GroupNorm(2, 8)),
    "layers.x: Strange is not a layer": Model(lambda self, h: self.layers["x"](h), x=Strange(8, 8, 3)),
    "layers.x: cannot be traced": Model(lambda self, h: self.layers["x"](h), x=Branching()),
    "layers.x: is called more than once": Model(lambda self, h: self.layers["x"](self.layers["x"](h)), x=nn.Conv2d(8, 8, 1)),
    "Model: its forward() differs between train": Model(lambda self, h: F.dropout(h, training=self.training)),
    "Model: its forward() differs between train and eval": Model(lambda self, h: h * torch.tensor(0.5 if self.training else 2.0)),
    "forward: takes a part of the images or channels by index": Model(lambda self, h: torch.cat([h[:, :4], h[:, 4:]], 1)),
    "forward: chunk() is not an operation": Model(lambda self, h: torch.cat(h.chunk(2, 1), 1)),
    "forward: cat of something that is not computed": Model(
        lambda self, h: self.layers["x"](torch.cat([h, self.gamma.expand(2, 8, 16, 16)], 1)), x=nn.Conv2d(16, 8, 1)
    ),
    "forward: cat along dimension 2": Model(lambda self, h: torch.cat([h, h], 2)),
    "forward: softmax is supported only over": Model(lambda self, h: F.softmax(h, 1)),
    "forward: mean over other dimensions": Model(lambda self, h: h.mean(1, keepdim=True).expand(-1, 8, -1, -1)),
    "forward: view to a fixed": Model(lambda self, h: h.view(-1, 8, 8, 32)),
    "forward: unsqueeze turns [2, 8, 16, 16] into [2, 1, 8, 16, 16]": Model(lambda self, h: h.unsqueeze(1).squeeze(1)),
    "forward: reshape to a fixed": Model(lambda self, h: torch.reshape(h, shape=(-1, 8, 16, 16))),
    "forward: mul makes 8 channels out of one": Model(lambda self, h: self.layers["x"](h) * self.gamma, x=nn.Conv2d(8, 1, 1)),
    "layers.x: it of something that is not": Model(lambda self, h: h + self.layers["x"](self.gamma[None]), x=nn.ReLU()),
    "layers.x: reads something that": Model(lambda self, h: h + self.layers["x"](self.gamma[None]), x=nn.Conv2d(8, 8, 1)),
    "layers.x: a linear layer on 3": Model(lambda self, h: self.layers["x"](h.flatten(2))[..., None], x=nn.Linear(256, 256)),
    "forward: has a value for each channel": Model(lambda self, h: h + self.gamma.exp().view(1, 8, 1, 1)),
    "gamma: has a value for each channel": Model(lambda self, h: h * self.gamma),
    "gamma: has a value for each channel, and": Model(lambda self, h: h.clamp(max=self.gamma)),
    "forward: has a value for each channel, and": Model(lambda self, h: h.sigmoid() ** self.gamma.exp()),
    "forward: add of channels that were concatenated differently: 8, and 4 + 4": Model(
        lambda self, h: h + torch.cat([self.layers["x"](h), self.layers["y"](h)], 1), x=nn.Conv2d(8, 4, 1), y=nn.Conv2d(8, 4, 1)
    ),
    "nothing to route": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "forward: the model must return one tensor": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)),
    "does not pass through the model": nn.Sequential(nn.Conv2d(4, 8, 3)),
    "stem: model_scale 0.1 leaves a layer of 8": Model(lambda self, h: h),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_converted_is_refused_with_its_name(message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        convert(REFUSED[message], 2, 0.1 if "0.1" in message else 0.5, example_input=torch.rand(1, 3, 16, 16))
    assert "\n" not in str(caught.value)


def test_wrong_arguments_are_refused():
    x = torch.rand(1, 3, 16, 16)
    with pytest.raises(UserError, match="unknown convolution 'conv3': did you mean conv2"):
        convert(LeNet(), example_input=x, plain=["conv3"])
    with pytest.raises(UserError, match=r"example_input must be images \[B, C, H, W\], not \[3, 16, 16\]"):
        convert(LeNet(), example_input=x[0])
    with pytest.raises(UserError, match="num_experts must be at least 1, not 0"):
        convert(LeNet(), 0, example_input=x)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_dense_kind_is_narrowed_without_experts(scale):
    x = images()
    model = convert(make_network("resnet"), kind=DenseKind(scale), example_input=x)
    assert model.moe_layers() == []
    if scale == 1:
        torch.testing.assert_close(model(x), make_network("resnet")(x), rtol=1e-9, atol=1e-9)
    assert max(layer.weight.shape[0] for layer in model.modules() if isinstance(layer, nn.Conv2d)) == int(24 * scale)


def test_the_kind_decides_bank_routers_and_norms():
    kind = MoEKind(0.5, 3, bank="disjoint", routers="per_network", norms="shared")
    model = convert(make_network("resnet"), kind=kind, example_input=images()).double()
    (routing,) = model.forward_routed(images())[1]
    assert routing.logits.shape == (len(images()), 3)
    for layer in model.moe_layers():
        assert (layer.index, layer.router, type(layer.norm)) == (0, None, nn.BatchNorm2d)
        assert layer.starts == (0, layer.width, 2 * layer.width)
    with pytest.raises(UserError, match="no masks for at_sparse"):
        convert(make_network("resnet"), kind=MaskedKind(0.5), example_input=images())


def between_convolutions(forward, *layers):
    """A model that computes `forward(layers, h)` between two convolutions."""

    class Everyday(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.layers, self.head = nn.ModuleList(layers), nn.Linear(8, 5)

        def forward(self, x):
            h = self.second(forward(self.layers, F.relu(self.first(x))))
            return self.head(h.mean((2, 3)))

    torch.manual_seed(0)
    return Everyday().eval()


def squeeze_excitation(expand):
    """Squeeze and excitation. `expand(w, h)` gives its weights [B, C] the shape of the images."""

    def forward(layers, h):
        return h * expand(torch.sigmoid(layers[1](F.relu(layers[0](h.mean((2, 3)))))), h)

    return between_convolutions(forward, nn.Linear(8, 4), nn.Linear(4, 8))


SPELLINGS = {
    "w[:, :, None, None]": squeeze_excitation(lambda w, h: w[:, :, None, None]),
    "w[..., None, None]": squeeze_excitation(lambda w, h: w[..., None, None]),
    "expand_as": squeeze_excitation(lambda w, h: w.view(h.size(0), h.size(1), 1, 1).expand_as(h)),
    "expand": squeeze_excitation(lambda w, h: w[:, :, None, None].expand(-1, -1, h.size(2), h.size(3))),
    "unsqueeze": squeeze_excitation(lambda w, h: w.unsqueeze(-1).unsqueeze(-1)),
    "one PReLU": between_convolutions(lambda layers, h: layers[0](h), nn.PReLU()),
    "a PReLU for each channel": between_convolutions(lambda layers, h: layers[0](h), nn.PReLU(8)),
    "F.pad and a crop": between_convolutions(lambda layers, h: F.pad(h, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]),
    "axis": between_convolutions(lambda layers, h: h / (1 + h.amax(axis=(2, 3), keepdim=True))),
    "a constant": between_convolutions(lambda layers, h: h * torch.tensor([0.5]).view(1, 1, 1, 1)),
    "clamp by numbers": between_convolutions(lambda layers, h: h.clamp(-1, max=1).clip(min=-0.5)),
    "clamp by a tensor": between_convolutions(lambda layers, h: torch.clamp(h, max=h.mean((2, 3), keepdim=True))),
    "powers": between_convolutions(lambda layers, h: h**2 + h.square().pow(0.5) + torch.pow(2, -h.square())),
    "x * tanh(softplus(x))": between_convolutions(lambda layers, h: h * F.softplus(h).tanh()),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_common_ways_to_write_an_operation_are_converted(name):
    model, x = SPELLINGS[name], torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(convert(model, 2, 1.0, example_input=x)(x), model(x))
    assert convert(model, 2, 0.5, example_input=x)(x).shape == (3, 5)


class Chained(nn.Module):
    """Two sums that tie the channels of three convolutions to one another, one of them twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.stem, self.wide, self.narrow = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.Conv2d(4, 6, 3, padding=1),
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        a, b, c = self.a(x), self.b(x), self.c(x)
        h = torch.cat([a, b], 1) + torch.cat([c, c], 1)
        return self.head((self.wide(h) + self.narrow(a + b)).mean((2, 3)))


def test_channels_that_are_tied_twice_have_one_width():
    torch.manual_seed(0)
    model, x = Chained().eval(), torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(convert(model, 2, 1.0, example_input=x)(x), model(x))
    assert convert(model, 2, 0.5, example_input=x)(x).shape == (3, 5)


def test_a_softmax_at_the_end_is_over_all_classes():
    model = nn.Sequential(*between_convolutions(lambda layers, h: h).children(), nn.LogSoftmax(1))
    model = nn.Sequential(model[0], model[1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), model[3], nn.LogSoftmax(1))
    x = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(convert(model, 2, 0.5, example_input=x)(x).exp().sum(dim=1), torch.ones(3))


def test_images_of_another_size_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 64, 5))
    moe = convert(model, example_input=torch.rand(1, 3, 8, 8))
    with pytest.raises(UserError, match="a network converted for images 3x8x8 does not take 3x9x9: "):
        moe(torch.rand(1, 3, 9, 9))


def test_other_errors_are_not_blamed_on_the_size_of_the_images():
    moe = convert(between_convolutions(lambda layers, h: h), example_input=torch.rand(1, 3, 8, 8))
    assert moe(torch.rand(1, 3, 9, 9)).shape == (1, 5)
    with pytest.raises(RuntimeError, match=r"^Input type \(double\)"):
        moe(torch.rand(1, 3, 9, 9, dtype=torch.float64))
    with patch.object(moe.traced, "forward", side_effect=torch.OutOfMemoryError), pytest.raises(torch.OutOfMemoryError):
        moe(torch.rand(1, 3, 9, 9))


def test_a_model_with_two_inputs_is_refused():
    class Two(LeNet):
        def forward(self, x, y):
            return super().forward(x + y)

    with pytest.raises(UserError, match="Two: takes y beside the images"):
        convert(Two(), example_input=torch.rand(1, 3, 16, 16))

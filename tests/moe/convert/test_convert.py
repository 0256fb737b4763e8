"""Plain networks in their MoE form, against the plain networks themselves and against slow twins."""

import copy
import math
import re

import pytest
import torch
from masked_twin import expert_filters, gate_weights, router_logits
from plain_networks import NETWORKS, LeNet, images, used
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


def converted(name, num_experts=2, model_scale=0.5, parted=True):
    """The MoE form of a used network; with experts, norms that differ and calibrated routers, if `parted`."""
    model = convert(used(name), num_experts, model_scale, example_input=images(1))
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.moe_layers():
            own = [layer.filters, layer.bias] if layer.norm is None else [layer.filters, layer.norm.weight, layer.norm.running_mean]
            for parameter in own if parted else []:
                if parameter is not None:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            layer.router.train(parted)  # statistics of these images
        model(images())
    return model.eval()


def answers(network, x):
    """Logits, and their gradient to the images."""
    x = x.clone().requires_grad_()
    logits = network(x)
    return logits, torch.autograd.grad(logits.square().sum(), x)[0]


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_at_scale_one_it_is_the_model(name, num_experts):
    model = converted(name, num_experts, 1.0, parted=False)
    torch.testing.assert_close(answers(model, images()), answers(used(name), images()), rtol=1e-9, atol=1e-9)


def masked(plain, model, scale):
    """The plain network with all dropped channels held at zero, and what sums over fewer inputs scaled up: a slow twin."""
    alive = {}  # by layer, [C]

    def dropped(name):
        def hook(module, inputs, out):
            dims = [1] * (out.ndim - 2)
            if name not in alive:  # in a first pass, 1 flows through live channels and 0 through dropped ones
                if isinstance(module, nn.Conv2d | nn.Linear):
                    kept = out.shape[1] if out.shape[1] in (1, 3, CLASSES) else int(scale * out.shape[1])
                    alive[name] = torch.arange(out.shape[1]) < kept
                else:
                    alive[name] = inputs[0].transpose(0, 1).flatten(1).ne(0).any(dim=1)
                return alive[name].to(out).view(1, -1, *dims).expand_as(out).clone()
            if isinstance(module, nn.Conv2d | nn.Linear):
                bias = 0 if module.bias is None else module.bias.view(1, -1, *dims)
                out = (out - bias) * math.sqrt(inputs[0].shape[1] / columns(model.traced.get_submodule(name))) + bias
            return out * alive[name].to(out).view(1, -1, *dims)

        return hook

    for name, module in plain.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.BatchNorm1d):
            module.register_forward_hook(dropped(name))
    plain(images())
    return plain


def columns(layer):
    """How many inputs a narrow layer has."""
    return (layer.filters if isinstance(layer, MoEConv2d) else layer.weight).shape[1]


@pytest.mark.parametrize("scale", [0.5, 0.3])
@pytest.mark.parametrize("name", NETWORKS)
def test_below_it_is_the_model_without_the_channels_that_are_dropped(name, scale):
    model = converted(name, 2, scale, parted=False)
    twin = masked(used(name), model, scale)
    torch.testing.assert_close(answers(model, images()), answers(twin, images()), rtol=1e-9, atol=1e-9)
    plain = sum(parameter.numel() for parameter in used(name).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) < plain


class Slow(nn.Module):
    """Every expert by a convolution, bias and norm of its own, masked with its weight, summed."""

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
    """The same network, its MoE layers computed the slow way; the parameters are the model's own."""
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for place in NETWORKS[name][1]:
        out_channels = used(name).get_submodule(place).out_channels
        twin.traced.set_submodule(place, Slow(twin.traced.get_submodule(place), out_channels))
    return twin


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients_of_the_slow_twin(name, gate):
    model = converted(name, num_experts=3).eval()
    both = []
    for network in (model, slow_twin(name, model)):
        x = images().requires_grad_()
        logits, routings = network.forward_routed(x, gate)
        loss = logits.square().sum() + sum(routing.logits.square().sum() for routing in routings)
        gradients = torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True)
        both.append((logits, *(routing.experts for routing in routings), *(0 if g is None else g for g in gradients)))
    torch.testing.assert_close(*both, rtol=1e-8, atol=1e-8)
    chosen = torch.stack(both[0][1 : 1 + len(NETWORKS[name][1])])
    assert any(len(row.unique()) > 1 for row in chosen)  # routes that mix experts in a batch


@pytest.mark.parametrize("name", NETWORKS)
def test_every_larger_convolution_behind_the_first_is_routed_in_the_order_of_calls(name):
    model, places = converted(name), NETWORKS[name][1]
    layers = [model.traced.get_submodule(place) for place in places]
    assert model.moe_layers() == layers
    assert [layer.index for layer in layers] == list(range(len(places)))
    assert {place for place, module in model.traced.named_modules() if isinstance(module, MoEConv2d)} == set(places)
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
    """Convolutions of one list called before and after another's."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.outer = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.inner = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1)])

    def forward(self, x):
        h = self.outer[0](self.inner[0](self.outer[1](self.stem(x))))
        return self.head(h.mean((2, 3)))


def test_layers_of_lists_that_are_called_in_turns_are_in_the_order_of_calls():
    model = convert(Interleaved(), example_input=torch.rand(1, 3, 16, 16))
    places = [model.traced.get_submodule(place) for place in ("outer.1", "inner.0", "outer.0")]
    assert model.moe_layers() == places
    route = torch.tensor([[0, 1, 0], [1, 0, 0]])
    experts = [routing.experts for routing in model.forward_routed(torch.rand(2, 3, 16, 16), ForcedGate(route))[1]]
    assert torch.equal(torch.stack(experts, dim=1), route)


def test_widths_follow_the_model_scale():
    model = convert(used("densenet"), model_scale=0.3, example_input=images(1)).traced
    # stem int(2.4), growth int(1.2) and transition int(3.0) of 8, 4 and 10; the first norm behind two joins reads 2 + 1
    assert [tuple(conv.filters.shape[:2]) for conv in model.convs.children()] == [(2, 2), (2, 3), (2, 3), (2, 4)]
    assert tuple(model.stem.weight.shape[:2]) == (2, 3)
    assert tuple(model.transition.weight.shape[:2]) == (3, 4)
    assert [norm.num_features for norm in model.norms.children()] == [2, 3, 3, 4]
    assert (model.last.num_features, tuple(model.head.weight.shape)) == (5, (5, 5))


def test_norms_behind_moe_layers_are_the_experts_own_and_the_others_stay():
    model = converted("resnet").traced.network
    assert not hasattr(model.stages.get_submodule("0"), "norm2")
    assert model.stages.get_submodule("0").conv2.norm.eps == 1e-3
    assert isinstance(model.stages.get_submodule("0").norm1, nn.BatchNorm2d)
    assert converted("densenet").moe_layers()[0].norm is None
    assert converted("lenet").moe_layers()[0].bias.shape == (2, 8)


def test_the_model_stays_as_it_is():
    model = used("resnet").train()
    before = copy.deepcopy(model.state_dict())
    made = convert(model, example_input=images(1))
    assert made.training
    assert model.training
    made.forward_routed(images())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not convert(model.eval(), example_input=images(1)).training


def test_layers_named_plain_are_narrowed_and_not_routed():
    model = convert(used("vgg"), example_input=images(1), plain=["network.7"])
    assert len(model.moe_layers()) == 2
    assert tuple(model.traced.network.get_submodule("7").weight.shape) == (8, 8, 3, 3)


@pytest.mark.parametrize("name", ["vgg", "resnet", "squeezenet"])
def test_states_load_and_fused_twins_agree(name):
    model = converted(name).eval()
    other = convert(used(name), example_input=images(1))
    other.load_state_dict(model.state_dict())
    expected = model.forward_routed(images())
    for twin in (other, fused(model), copy.deepcopy(model)):
        torch.testing.assert_close(twin.forward_routed(images()), expected, rtol=1e-9, atol=1e-9)
    assert all(layer.norm is None for layer in fused(model).moe_layers())


BATCHES = {
    level: (images().float().roll(turn, 0), torch.arange(6).roll(turn) % CLASSES)
    for turn, level in enumerate(("routers", "weights", "all"))
}


def state(name, levels):
    """A calibrated float32 network and its optimizers."""
    model = converted(name).float()
    with torch.no_grad():
        model.train()(BATCHES["all"][0])
    config = RunConfig(attack=AttackConfig(num_steps=2), training=TrainingConfig(lr=0.05, router_lr=0.05))
    optimizers = {level: torch.optim.SGD(LEVELS[level](model), 0.05) for level in levels}
    draws = BatchDraws(torch.Generator().manual_seed(0))
    return TrainState(model.eval(), config, LOSSES["trades"], optimizers, draws, None, 1.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_level_training_learns_both_levels_and_leaves_none_out(name):
    own = state(name, ("routers", "weights"))
    before = {key: parameter.detach().clone() for key, parameter in own.model.named_parameters()}
    metrics = two_level(own, BATCHES)
    assert metrics["load"].shape == (len(NETWORKS[name][1]), 2)
    assert torch.isfinite(metrics["loss"])
    still = {key for key, parameter in own.model.named_parameters() if torch.equal(before[key], parameter)}
    routers = {key for key in before if ".router." in key}
    assert not still & routers
    assert not {key for key in still - routers if "filters" in key or key.endswith("conv1.weight")}


def test_training_lowers_the_loss():
    own = state("resnet", ("all",))
    losses = [single_level(own, {"all": BATCHES["all"]})["loss"].item() for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


class Model(nn.Module):
    """conv, then the forward under test, which may use `inner`."""

    def __init__(self, forward, **inner):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.inner = nn.ModuleDict(inner)
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))
        self.middle = forward

    def forward(self, x):
        h = self.conv(self.stem(x))
        return self.head(self.middle(self, h).mean((2, 3)))


def with_conv(**settings):
    """A model whose second convolution is built with `settings`."""
    conv = nn.Conv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1, **settings})
    return Model(lambda self, h: self.inner["x"](h), x=conv)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Strange(nn.Conv2d):
    pass


REFUSED = {
    "inner.x: has 8 groups": with_conv(groups=8),
    "inner.x: a kernel of 3x1": with_conv(kernel_size=(3, 1), padding=(1, 0)),
    "inner.x: a kernel of 2x2": with_conv(kernel_size=2),
    "inner.x: strides 1 and 2": with_conv(stride=(1, 2)),
    "inner.x: dilation 2": with_conv(dilation=2, padding=2),
    "inner.x: padding_mode reflect": with_conv(padding_mode="reflect"),
    "inner.x: padding (0, 0), where an MoE layer of kernel 3 has 1 (plain=['inner.x']": with_conv(padding=0),
    "inner.x: padding valid": with_conv(padding="valid"),
    "inner.x: GroupNorm is not a layer": Model(lambda self, h: self.inner["x"](h), x=nn.GroupNorm(2, 8)),
    "inner.x: Strange is not a layer": Model(lambda self, h: self.inner["x"](h), x=Strange(8, 8, 3)),
    "inner.x: cannot be traced": Model(lambda self, h: self.inner["x"](h), x=Branching()),
    "inner.x: is called more than once": Model(lambda self, h: self.inner["x"](self.inner["x"](h)), x=nn.Conv2d(8, 8, 1)),
    "Model: its forward() differs between train": Model(lambda self, h: F.dropout(h, training=self.training)),
    "forward: takes a part of the images or channels by index": Model(lambda self, h: torch.cat([h[:, :4], h[:, 4:]], 1)),
    "forward: chunk() is not an operation": Model(lambda self, h: torch.cat(h.chunk(2, 1), 1)),
    "forward: cat of something that is not computed": Model(
        lambda self, h: self.inner["x"](torch.cat([h, self.gamma.expand(2, 8, 16, 16)], 1)), x=nn.Conv2d(16, 8, 1)
    ),
    "forward: cat along dimension 2": Model(lambda self, h: torch.cat([h, h], 2)),
    "forward: softmax is supported over": Model(lambda self, h: F.softmax(h, 1)),
    "forward: mean over other dimensions": Model(lambda self, h: h.mean(1, keepdim=True).expand(-1, 8, -1, -1)),
    "forward: view to a fixed": Model(lambda self, h: h.view(-1, 8, 8, 32)),
    "forward: unsqueeze turns [2, 8, 16, 16] into [2, 1, 8, 16, 16]": Model(lambda self, h: h.unsqueeze(1).squeeze(1)),
    "forward: reshape to a fixed": Model(lambda self, h: torch.reshape(h, shape=(-1, 8, 16, 16))),
    "forward: mul makes 8 channels out of one": Model(lambda self, h: self.inner["x"](h) * self.gamma, x=nn.Conv2d(8, 1, 1)),
    "inner.x: it of something that is not": Model(lambda self, h: h + self.inner["x"](self.gamma[None]), x=nn.ReLU()),
    "inner.x: reads something that": Model(lambda self, h: h + self.inner["x"](self.gamma[None]), x=nn.Conv2d(8, 8, 1)),
    "inner.x: a linear layer on 3": Model(lambda self, h: self.inner["x"](h.flatten(2))[..., None], x=nn.Linear(256, 256)),
    "forward: has a value for each channel": Model(lambda self, h: h + self.gamma.exp().view(1, 8, 1, 1)),
    "gamma: has a value for each channel": Model(lambda self, h: h * self.gamma),
    "forward: add of channels that were concatenated differently: 8, and 4 + 4": Model(
        lambda self, h: h + torch.cat([self.inner["x"](h), self.inner["y"](h)], 1), x=nn.Conv2d(8, 4, 1), y=nn.Conv2d(8, 4, 1)
    ),
    "nothing to route": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "forward: the model must return one tensor": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)),
    "does not pass through the model": nn.Sequential(nn.Conv2d(4, 8, 3)),
    "stem: model_scale 0.1 leaves a layer of 8": Model(lambda self, h: h),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_turned_is_named(message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        convert(REFUSED[message], 2, 0.1 if "0.1" in message else 0.5, example_input=torch.rand(1, 3, 16, 16))
    assert "\n" not in str(caught.value)


def test_other_mistakes_are_named():
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
    model = convert(used("resnet"), kind=DenseKind(scale), example_input=x)
    assert model.moe_layers() == []
    if scale == 1:
        torch.testing.assert_close(model(x), used("resnet")(x), rtol=1e-9, atol=1e-9)
    assert max(layer.weight.shape[0] for layer in model.modules() if isinstance(layer, nn.Conv2d)) == int(24 * scale)


def test_kinds_are_obeyed():
    kind = MoEKind(0.5, 3, bank="disjoint", routers="per_network", norms="shared")
    model = convert(used("resnet"), kind=kind, example_input=images()).double()
    (routing,) = model.forward_routed(images())[1]
    assert routing.logits.shape == (len(images()), 3)
    for layer in model.moe_layers():
        assert (layer.index, layer.router, type(layer.norm)) == (0, None, nn.BatchNorm2d)
        assert layer.starts == (0, layer.width, 2 * layer.width)
    with pytest.raises(UserError, match="no masks for at_sparse"):
        convert(used("resnet"), kind=MaskedKind(0.5), example_input=images())


def everyday(forward, *layers):
    """A model that does `forward(layers, h)` between two convolutions."""

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


def excited(spread):
    """Squeeze and excitation, its weights [B, C] spread over the images by `spread(w, h)`."""

    def forward(layers, h):
        return h * spread(torch.sigmoid(layers[1](F.relu(layers[0](h.mean((2, 3)))))), h)

    return everyday(forward, nn.Linear(8, 4), nn.Linear(4, 8))


EVERYDAY = {
    "w[:, :, None, None]": excited(lambda w, h: w[:, :, None, None]),
    "w[..., None, None]": excited(lambda w, h: w[..., None, None]),
    "expand_as": excited(lambda w, h: w.view(h.size(0), h.size(1), 1, 1).expand_as(h)),
    "expand": excited(lambda w, h: w[:, :, None, None].expand(-1, -1, h.size(2), h.size(3))),
    "unsqueeze": excited(lambda w, h: w.unsqueeze(-1).unsqueeze(-1)),
    "one PReLU": everyday(lambda layers, h: layers[0](h), nn.PReLU()),
    "a PReLU for each channel": everyday(lambda layers, h: layers[0](h), nn.PReLU(8)),
    "F.pad and a crop": everyday(lambda layers, h: F.pad(h, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]),
    "axis": everyday(lambda layers, h: h / (1 + h.amax(axis=(2, 3), keepdim=True))),
    "x * tanh(softplus(x))": everyday(lambda layers, h: h * F.softplus(h).tanh()),
}


@pytest.mark.parametrize("name", EVERYDAY)
def test_everyday_spellings_are_followed(name):
    model, x = EVERYDAY[name], torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(convert(model, 2, 1.0, example_input=x)(x), model(x))
    assert convert(model, 2, 0.5, example_input=x)(x).shape == (3, 5)


def test_a_softmax_at_the_end_is_over_all_classes():
    model = nn.Sequential(*everyday(lambda layers, h: h).children(), nn.LogSoftmax(1))
    model = nn.Sequential(model[0], model[1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), model[3], nn.LogSoftmax(1))
    x = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(convert(model, 2, 0.5, example_input=x)(x).exp().sum(dim=1), torch.ones(3))


def test_images_of_another_size_are_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 64, 5))
    moe = convert(model, example_input=torch.rand(1, 3, 8, 8))
    with pytest.raises(UserError, match="a network converted for images 3x8x8 does not take 3x9x9: "):
        moe(torch.rand(1, 3, 9, 9))


def test_one_tensor_in():
    class Two(LeNet):
        def forward(self, x, y):
            return super().forward(x + y)

    with pytest.raises(UserError, match="Two: takes y beside the images"):
        convert(Two(), example_input=torch.rand(1, 3, 16, 16))

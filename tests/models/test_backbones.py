"""Every backbone in every kind on every data set, compared with counts from the published architectures.

densenet121 is densenet40 with more layers: it is built for ImageNet only. CIFAR-100 differs from the others in its classes only.
"""

import itertools
import math
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn.functional import cross_entropy

from advmoe.config import ModelConfig
from advmoe.data import ImageSpec
from advmoe.errors import UserError
from advmoe.evaluation.cost import cost
from advmoe.models import MODELS, build_model
from advmoe.moe import DenseKind, MaskedKind, MoEKind, StraightThroughGate

KINDS = {
    "dense": DenseKind(),
    "small dense, silu": DenseKind(0.5, activation="silu"),
    "masked": MaskedKind(0.5),
    "moe per layer": MoEKind(0.5, num_experts=2, norms="shared"),
    "moe per network": MoEKind(0.8, num_experts=3, bank="disjoint", routers="per_network", norms="shared"),
    "moe per stage": MoEKind(0.5, num_experts=2, routers="per_stage", norms="shared"),
    "moe per-expert norms": MoEKind(0.75, num_experts=2, norms="per_expert"),
}
DATA = {  # (C, H, W), classes, stem
    "cifar10": ((3, 32, 32), 10, "cifar"),
    "tinyimagenet": ((3, 64, 64), 200, "cifar"),
    "imagenet": ((3, 224, 224), 1000, "imagenet"),
    "fashion-mnist": ((1, 28, 28), 10, "cifar"),
}
PAIRS = [(backbone, data) for backbone in MODELS for data in DATA if backbone != "densenet121" or data == "imagenet"]  # see above
WIDTHS = {"resnet18": 4, "wrn28_10": 20, "vgg16_bn": 4, "densenet40": 4, "densenet121": 2}


class Conv(NamedTuple):
    """Channels in and out, kernel, side of the output; `full`: channels out of the dense layer, if the layer may be routed."""

    ins: int
    outs: int
    kernel: int
    side: int
    full: int = 0


class Plan(NamedTuple):
    """The convolutions of a network, its batch norms after a routable convolution (`normed`) and elsewhere, masks, last width."""

    convs: list[Conv]
    normed: list[int]
    norms: list[int]
    masks: list[int]
    last: int


def keep(kind, full):
    return full if isinstance(kind, MaskedKind) else math.floor(Fraction(str(kind.scale)) * full)


def halved(side):
    return (side + 1) // 2


def first(stem, side):
    """Kernel of the first convolution, side of its output, side after the pooling that may follow."""
    return (7, halved(side), halved(halved(side))) if stem == "imagenet" else (3, side, side)


def resnet_plan(kind, width, shape, stem):
    kernel, stem_side, side = first(stem, shape[1])
    channels = width if isinstance(kind, MoEKind) else keep(kind, width)
    plan = Plan([Conv(shape[0], channels, kernel, stem_side)], [], [channels], [width], 0)
    for stage in range(4):
        full = width * 2**stage
        outs = keep(kind, full)
        side = halved(side) if stage else side
        plan.masks.extend([full] * (2 + (stage > 0)))  # two of blocks, and the stage's (the first stage has the stem's)
        if stage or channels != outs:
            plan.convs.append(Conv(channels, outs, 1, side))
            plan.norms.append(outs)
        for ins in (channels, outs):
            plan.convs.extend([Conv(ins, outs, 3, side, full), Conv(outs, outs, 3, side, full)])
            plan.normed.extend([outs, outs])
        channels = outs
    return plan._replace(last=channels)


def wrn_plan(kind, width, shape, stem):
    kernel, stem_side, side = first(stem, shape[1])
    channels = keep(kind, width // 10)
    plan = Plan([Conv(shape[0], channels, kernel, stem_side)], [], [], [width // 10], 0)
    for stage in range(3):
        full = width * 2**stage
        outs = keep(kind, full)
        side = halved(side) if stage else side
        plan.masks.extend([full] * 5)
        plan.convs.append(Conv(channels, outs, 1, side))
        for ins in (channels, outs, outs, outs):
            plan.norms.append(ins)
            plan.convs.extend([Conv(ins, outs, 3, side, full), Conv(outs, outs, 3, side, full)])
            plan.normed.append(outs)
        channels = outs
    plan.norms.append(channels)
    return plan._replace(last=channels)


def vgg_plan(kind, width, shape, stem):
    fulls = [[1, 1], [2, 2], [4, 4, 4], [8, 8, 8], [8, 8, 8]]
    channels, side, plan = shape[0], shape[1], Plan([], [], [], [], 0)
    for stage in fulls:
        for factor in stage:
            full, outs = factor * width, keep(kind, factor * width)
            plan.masks.append(full)
            (plan.normed if plan.convs else plan.norms).append(outs)
            plan.convs.append(Conv(channels, outs, 3, side, full if plan.convs else 0))
            channels = outs
        side = halved(side)
    return plan._replace(last=channels)


def densenet_plan(layers):
    def plan_of(kind, width, shape, stem):
        kernel, stem_side, side = first(stem, shape[1])
        full, channels = 2 * width, keep(kind, 2 * width)
        plan = Plan([Conv(shape[0], channels, kernel, stem_side)], [], [channels] if stem == "imagenet" else [], [full], 0)
        bottleneck, growth = keep(kind, 4 * width), keep(kind, width)
        for block, depth in enumerate(layers):
            if block:
                plan.norms.append(channels)
                plan.convs.append(Conv(channels, keep(kind, full // 2), 1, side))
                full, channels, side = full // 2, keep(kind, full // 2), side // 2
                plan.masks.append(full)
            for _ in range(depth):
                plan.norms.append(channels)
                plan.normed.append(bottleneck)
                plan.convs.extend([Conv(channels, bottleneck, 1, side, 4 * width), Conv(bottleneck, growth, 3, side, width)])
                plan.masks.extend([4 * width, width])
                full, channels = full + width, channels + growth
        plan.norms.append(channels)
        return plan._replace(last=channels)

    return plan_of


PLANS = {
    "resnet18": resnet_plan, "wrn28_10": wrn_plan, "vgg16_bn": vgg_plan,
    "densenet40": densenet_plan((6, 6, 6)), "densenet121": densenet_plan((6, 12, 24, 16)),
}  # fmt: skip


STAGES = {  # the number of routable convolutions in each stage
    "resnet18": (4, 4, 4, 4), "wrn28_10": (8, 8, 8), "vgg16_bn": (1, 2, 3, 3, 3),
    "densenet40": (12, 12, 12), "densenet121": (12, 24, 48, 32),
}  # fmt: skip


def router_inputs(backbone, kind, plan):
    """The channels that each router of features sees: those of its layer's input, or of the input of its stage's first layer."""
    inputs = [conv.ins for conv in plan.convs if conv.full]
    starts = {"per_layer": range(len(inputs)), "per_stage": [0, *itertools.accumulate(STAGES[backbone])][:-1], "per_network": ()}
    return [inputs[start] for start in starts[kind.routers]] if isinstance(kind, MoEKind) else []


def network_router_plan(shape, stem):
    """Three stages of 16, 32, 64 channels, 3 residual blocks each."""
    kernel, stem_side, side = first(stem, shape[1])
    plan, channels = Plan([Conv(shape[0], 16, kernel, stem_side)], [], [16], [], 64), 16
    for width in (16, 32, 64):
        if width != channels:
            side = halved(side)
            plan.convs.append(Conv(channels, width, 1, side))
            plan.norms.append(width)
        for ins in (channels, width, width):
            plan.convs.extend([Conv(ins, width, 3, side), Conv(width, width, 3, side)])
            plan.norms.extend([width, width])
        channels = width
    return plan


def bank_size(kind, conv):
    """Filters of a routed layer: N windows of K among the C_out of the dense layer, or N * K separate ones."""
    total = kind.num_experts * conv.outs
    return total if kind.bank == "disjoint" else min(total, conv.full)


def params(kind, plan, classes, network_router):
    routed = isinstance(kind, MoEKind)
    total = (plan.last + 1) * classes + 2 * sum(plan.norms)
    total += 2 * sum(plan.normed) * (kind.num_experts if routed and kind.norms == "per_expert" else 1)
    for conv in plan.convs:
        filters = bank_size(kind, conv) if routed and conv.full else conv.outs
        total += filters * conv.ins * conv.kernel**2
    if isinstance(kind, MaskedKind):
        total += sum(plan.masks)
    if network_router is not None:
        total += params(DenseKind(), network_router, kind.num_experts, None)
    return total


def macs(kind, plan, classes, network_router):
    total = plan.last * classes
    for conv in plan.convs:
        total += conv.side**2 * conv.outs * conv.ins * conv.kernel**2
    return total + (macs(DenseKind(), network_router, kind.num_experts, None) if network_router is not None else 0)


def build(backbone, kind, data, width, seed=0):
    shape, classes, stem = DATA[data]
    torch.manual_seed(seed)
    spec = ImageSpec(tuple(map(str, range(classes))), shape, (0.5,) * shape[0], (0.25,) * shape[0])
    return build_model(ModelConfig(backbone=backbone, width=width, stem=stem), kind, spec)


def expected(backbone, kind, data, width):
    shape, classes, stem = DATA[data]
    plan = PLANS[backbone](kind, width, shape, stem)
    router = network_router_plan(shape, stem) if isinstance(kind, MoEKind) and kind.routers == "per_network" else None
    linear = [(channels, kind.num_experts) for channels in router_inputs(backbone, kind, plan)]
    return (
        params(kind, plan, classes, router) + sum((ins + 1) * outs for ins, outs in linear),
        macs(kind, plan, classes, router) + sum(ins * outs for ins, outs in linear),
    )


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("backbone", "data"), PAIRS)
def test_parameters_and_macs_of_every_backbone_in_every_kind_for_every_data_set(backbone, data, kind):
    model = build(backbone, kind, data, WIDTHS[backbone])
    counts = sum(p.numel() for p in model.parameters()), round(1e9 * cost(model, DATA[data][0]).gmacs_ideal)
    assert counts == expected(backbone, kind, data, WIDTHS[backbone])


NETWORKS = [(*pair, kind) for pair in PAIRS for kind in KINDS if pair[1] == "cifar10" or kind == "moe per network"]


@pytest.mark.parametrize(("backbone", "data", "kind"), [*NETWORKS, *((backbone, "imagenet", "masked") for backbone in MODELS)])
def test_every_backbone_has_gradients_and_can_be_saved_and_loaded(backbone, data, kind):
    """In every kind, and on every data set in the kind with the most parts."""
    model = build(backbone, KINDS[kind], data, WIDTHS[backbone])
    shape, classes, _ = DATA[data]
    with torch.no_grad():
        for layer in model.moe_layers():  # experts start equal, which leaves routers without a gradient
            layer.filters.add_(0.1 * torch.randn_like(layer.filters))
    x = torch.rand(2, shape[0], *(min(32, side) for side in shape[1:]))
    logits, _ = model.train().forward_routed(x, StraightThroughGate())
    assert logits.shape == (2, classes)
    cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    for group in (model.weight_parameters(), model.router_parameters(), model.mask_parameters()):
        assert not group or sum(p.grad.abs().sum() for p in group) > 0
    other = build(backbone, KINDS[kind], data, WIDTHS[backbone], seed=1).eval()
    other.load_state_dict(load(save({name: value.contiguous() for name, value in model.state_dict().items()})))
    with torch.no_grad():
        assert torch.equal(other(x), model.eval()(x))


@pytest.mark.parametrize(
    ("backbone", "data", "count"),
    [
        ("resnet18", "cifar10", 11_173_962),
        ("resnet18", "imagenet", 11_689_512),
        ("wrn28_10", "cifar10", 36_479_194),
        ("vgg16_bn", "cifar10", 14_724_042),
        ("densenet40", "cifar10", 176_122),
        ("densenet121", "imagenet", 7_978_856),
    ],
)
def test_published_numbers_of_parameters(backbone, data, count):
    width = MODELS[backbone][1]
    assert expected(backbone, DenseKind(), data, width)[0] == count
    with torch.device("meta"):
        model = build(backbone, DenseKind(), data, None)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("backbone", MODELS)
def test_silu_replaces_every_relu_but_the_network_routers(backbone):
    layers = [
        list(build(backbone, MoEKind(routers="per_network", activation=name), "cifar10", WIDTHS[backbone]).modules())
        for name in ("relu", "silu")
    ]
    kinds = [[type(layer) for layer in network if isinstance(layer, nn.ReLU | nn.SiLU)] for network in layers]
    in_router = [type(layer) for layer in layers[0][0].router.modules() if isinstance(layer, nn.ReLU)]
    assert kinds[0].count(nn.ReLU) == len(kinds[0]) == len(kinds[1]) > len(in_router)
    assert kinds[1].count(nn.ReLU) == len(in_router)
    assert kinds[1].count(nn.SiLU) == len(kinds[1]) - len(in_router)


def test_silu_is_x_times_its_sigmoid():
    x = torch.tensor([-2.0, 0.0, 2.0])
    values = DenseKind(activation="silu").nonlinearity()(x)
    assert values.tolist() == pytest.approx([-2 / (1 + math.exp(2)), 0, 2 / (1 + math.exp(-2))])
    with pytest.raises(UserError, match="activation must be one of relu, silu, not gelu"):
        DenseKind(activation="gelu")

import pytest
import torch
from image_specs import image_spec
from torch import nn

from advmoe.evaluation.cost import cost
from advmoe.models import MODELS, Classifier
from advmoe.moe import DenseKind, MaskedKind, MoEKind, images

CIFAR = (3, 32, 32)


def resnet18(kind, stem="cifar"):
    make, width = MODELS["resnet18"]
    return make(kind, image_spec(10), width=width, stem=stem)


def macs(model, shape=CIFAR):
    """Multiply-accumulates of one image: ideal, executed."""
    total = cost(model, shape)
    return round(1e9 * total.gmacs_ideal), round(1e9 * total.gmacs_executed)


def test_half_the_width_saves_three_quarters():
    dense, small, moe = (macs(resnet18(kind))[0] for kind in (DenseKind(), DenseKind(0.5), MoEKind(0.5)))
    assert 100 * (1 - small / dense) == pytest.approx(74.9, abs=0.05)
    assert 100 * (1 - moe / dense) == pytest.approx(72.7, abs=0.05)


def test_cost_is_in_billions_of_macs():
    total = cost(resnet18(DenseKind()), CIFAR)
    assert total.params == 11_173_962
    assert total.gmacs_ideal == pytest.approx(0.55542272)
    assert total.gmacs_executed == pytest.approx(0.55542272)


class Repeated(Classifier):
    """Layers that are called twice, a linear layer on [B, positions, features], and one that is never called."""

    def __init__(self, kind):
        super().__init__(kind, image_spec(10), "cifar")
        channels = kind.channels(8)
        self.stem, self.conv = kind.plain(images(3), channels), kind.conv(channels, channels)
        self.mix, self.unused = nn.Linear(channels.width, channels.width), nn.Linear(4, 4)
        self.finish(channels)

    def features(self, x, gate, logits):
        h, first = self.conv(self.stem(x), gate, logits)
        h, second = self.conv(h, gate, logits)
        return self.mix(self.mix(h.flatten(2).mT)).mT.view_as(h), first + second


@pytest.mark.parametrize("kind", [DenseKind(), MoEKind(0.5, 2)], ids=["dense", "MoE"])
def test_every_call_and_every_position_of_a_layer_counts(kind):
    total = cost(Repeated(kind), (3, 8, 8))
    assert total.gmacs_ideal == total.gmacs_executed
    assert {layer.name: layer.gmacs_ideal for layer in total.layers} == {layer.name: layer.gmacs_executed for layer in total.layers}
    assert next(layer.gmacs_ideal for layer in total.layers if layer.name == "unused") == 0


def test_products_of_triton_kernels_count():
    network = Repeated(MoEKind(0.5, 2))
    expected = cost(network, (3, 8, 8))
    for layer in network.moe_layers():
        layer.dispatch = "triton"
    assert cost(network, (3, 8, 8)) == expected
    assert {layer.dispatch for layer in network.moe_layers()} == {"triton"}


def test_counting_does_not_change_the_model():
    model = resnet18(MoEKind(0.2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost(model, CIFAR)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


KINDS = {
    "dense": DenseKind(),
    "small": DenseKind(0.3),
    "masked": MaskedKind(0.3),
    "moe": MoEKind(0.3, num_experts=3, norms="shared"),
    "disjoint": MoEKind(0.8, bank="disjoint"),
    "per_network": MoEKind(0.5, routers="per_network", norms="shared"),
    "per_stage": MoEKind(0.5, routers="per_stage", norms="shared"),
}


@pytest.mark.parametrize("backbone", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_sum_to_the_totals(backbone, kind):
    make, _ = MODELS[backbone]
    model = make(KINDS[kind], image_spec(10), width=40, stem="cifar")
    total = cost(model, CIFAR)
    assert len({layer.name for layer in total.layers}) == len(total.layers)
    assert sum(layer.params for layer in total.layers) == total.params == sum(p.numel() for p in model.parameters())
    for name in ("gmacs_ideal", "gmacs_executed"):
        assert round(1e9 * sum(getattr(layer, name) for layer in total.layers)) == round(1e9 * getattr(total, name))
    assert [layer.gmacs_ideal for layer in total.layers] == [layer.gmacs_executed for layer in total.layers]


def test_a_layer_counts_its_norm_but_not_its_router():
    layers = {layer.name: layer for layer in cost(resnet18(MoEKind(0.5, norms="shared")), CIFAR).layers}
    conv, router = layers["blocks.0.conv1"], layers["blocks.0.conv1.router.linear"]
    assert conv.params == 64 * 64 * 9 + 2 * 32  # both experts' filters, one norm
    assert conv.gmacs_ideal == conv.gmacs_executed == 32 * 64 * 9 * 32**2 / 1e9
    assert (router.params, router.gmacs_ideal) == (64 * 2 + 2, 64 * 2 / 1e9)


def test_a_network_router_is_counted_once():
    per_layer, per_network = (cost(resnet18(MoEKind(0.5, routers=routers)), CIFAR) for routers in ("per_layer", "per_network"))
    router = sum(layer.gmacs_ideal for layer in per_network.layers if layer.name.startswith("router."))
    # stem, three blocks at 32x32, stages 2 and 3 with a projection each, the linear layer
    stages = sum(
        side**2 * (9 * (w * i + 5 * w * w) + p) for side, i, w, p in ((32, 16, 16, 0), (16, 16, 32, 512), (8, 32, 64, 2048))
    )
    assert round(1e9 * router) == 32**2 * 27 * 16 + stages + 2 * 64
    routers = sum(layer.gmacs_ideal for layer in per_layer.layers if "router" in layer.name)
    assert per_network.gmacs_ideal - router == pytest.approx(per_layer.gmacs_ideal - routers)

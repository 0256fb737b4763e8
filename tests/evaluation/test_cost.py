import pytest
import torch
from image_specs import image_spec

from advmoe.evaluation.cost import cost
from advmoe.models import MODELS
from advmoe.moe import DenseKind, MaskedKind, MoEKind

CIFAR = (3, 32, 32)


def resnet18(kind, stem="cifar"):
    make, width = MODELS["resnet18"]
    return make(kind, image_spec(10), width=width, stem=stem)


def macs(model, shape=CIFAR):
    """Multiply-accumulates of one image: ideal, executed."""
    total = cost(model, shape)
    return round(1e9 * total.gmacs_ideal), round(1e9 * total.gmacs_executed)


def macs_by_hand(widths, stem, num_experts=0, size=32):
    """3x3 stem, four stages of two blocks of two 3x3 convolutions, 1x1 projections, routers (C_in * N each), classifier."""
    total, channels, side = 3 * 9 * stem * size**2, stem, size
    for stage, width in enumerate(widths):
        for block in range(2):
            if stage > 0 and block == 0:
                side //= 2
            total += side**2 * 9 * (channels * width + width * width)
            if channels != width or (stage > 0 and block == 0):
                total += side**2 * channels * width
            total += num_experts * (channels + width)
            channels = width
    return total + 10 * channels


def test_dense_resnet18_has_the_papers_macs():
    count = macs_by_hand([64, 128, 256, 512], 64)
    assert count == 555_422_720
    assert macs(resnet18(DenseKind())) == (count, count)


@pytest.mark.parametrize(("scale", "widths"), [(0.2, [12, 25, 51, 102]), (0.5, [32, 64, 128, 256]), (0.8, [51, 102, 204, 409])])
@pytest.mark.parametrize("num_experts", [1, 2, 4])
def test_moe_counts_and_executes_one_expert_and_the_routers(scale, widths, num_experts):
    count = macs_by_hand(widths, 64, num_experts)
    assert macs(resnet18(MoEKind(scale, num_experts=num_experts))) == (count, count)


@pytest.mark.parametrize(("scale", "widths"), [(0.2, [12, 25, 51, 102]), (0.5, [32, 64, 128, 256])])
def test_small_dense_macs(scale, widths):
    assert macs(resnet18(DenseKind(scale)))[0] == macs_by_hand(widths, widths[0])


def test_half_the_width_saves_three_quarters():
    dense, small, moe = (macs(resnet18(kind))[0] for kind in (DenseKind(), DenseKind(0.5), MoEKind(0.5)))
    assert 100 * (1 - small / dense) == pytest.approx(74.9, abs=0.05)
    assert 100 * (1 - moe / dense) == pytest.approx(72.7, abs=0.05)


def test_more_experts_add_only_router_macs():
    two, eight = (macs(resnet18(MoEKind(0.5, num_experts=n)))[0] for n in (2, 8))
    inputs = [64, 32, 32, 32, 32, 64, 64, 64, 64, 128, 128, 128, 128, 256, 256, 256]
    assert eight - two == 6 * sum(inputs)


def test_overlapping_and_disjoint_banks_cost_the_same():
    assert len({macs(resnet18(MoEKind(0.8, bank=bank)))[0] for bank in ("backbone", "disjoint")}) == 1


def test_the_imagenet_stem_is_counted():
    # 7x7 stride 2 on 64 x 64, then pooling to 16 x 16
    dense = macs_by_hand([64, 128, 256, 512], 64, size=16) - 3 * 9 * 64 * 16**2 + 3 * 49 * 64 * 32**2
    assert macs(resnet18(DenseKind(), stem="imagenet"), (3, 64, 64)) == (dense, dense)


def test_cost_is_in_billions_of_macs():
    total = cost(resnet18(DenseKind()), CIFAR)
    assert total.params == 11_173_962
    assert total.gmacs_ideal == pytest.approx(0.55542272)
    assert total.gmacs_executed == pytest.approx(0.55542272)


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

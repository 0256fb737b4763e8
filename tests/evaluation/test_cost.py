import pytest
import torch

from advmoe.evaluation.cost import cost, executed_macs, ideal_macs
from advmoe.models import MODELS
from advmoe.moe import DenseKind, MoEKind

CIFAR = (3, 32, 32)


def resnet18(kind, stem="cifar"):
    return MODELS["resnet18"](kind, width=64, stem=stem, num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)


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


def test_dense_resnet18_counts_what_the_papers_column_says():
    macs = macs_by_hand([64, 128, 256, 512], 64)
    assert macs == 555_422_720
    assert ideal_macs(resnet18(DenseKind()), CIFAR) == macs
    assert executed_macs(resnet18(DenseKind()), CIFAR) == macs


@pytest.mark.parametrize(("scale", "widths"), [(0.2, [12, 25, 51, 102]), (0.5, [32, 64, 128, 256]), (0.8, [51, 102, 204, 409])])
@pytest.mark.parametrize("num_experts", [1, 2, 4])
def test_moe_counts_one_expert_and_its_routers_and_executes_no_more(scale, widths, num_experts):
    macs = macs_by_hand(widths, 64, num_experts)
    model = resnet18(MoEKind(scale, num_experts=num_experts))
    assert ideal_macs(model, CIFAR) == macs
    assert executed_macs(model, CIFAR) == macs


@pytest.mark.parametrize(("scale", "widths"), [(0.2, [12, 25, 51, 102]), (0.5, [32, 64, 128, 256])])
def test_small_dense_counts(scale, widths):
    assert ideal_macs(resnet18(DenseKind(scale, scale)), CIFAR) == macs_by_hand(widths, widths[0])


def test_half_the_width_saves_three_quarters():
    dense = ideal_macs(resnet18(DenseKind()), CIFAR)
    small = ideal_macs(resnet18(DenseKind(0.5, 0.5)), CIFAR)
    moe = ideal_macs(resnet18(MoEKind(0.5)), CIFAR)
    assert 100 * (1 - small / dense) == pytest.approx(74.9, abs=0.05)
    assert 100 * (1 - moe / dense) == pytest.approx(72.7, abs=0.05)


def test_more_experts_cost_their_routers_alone():
    two, eight = (ideal_macs(resnet18(MoEKind(0.5, num_experts=n)), CIFAR) for n in (2, 8))
    inputs = [64, 32, 32, 32, 32, 64, 64, 64, 64, 128, 128, 128, 128, 256, 256, 256]
    assert eight - two == 6 * sum(inputs)


def test_overlapping_and_disjoint_banks_cost_the_same():
    assert len({ideal_macs(resnet18(MoEKind(0.8, bank=bank)), CIFAR) for bank in ("backbone", "disjoint")}) == 1


def test_the_imagenet_stem_is_counted():
    # 7x7 stride 2 on 64 x 64, then pooling to 16 x 16
    dense = macs_by_hand([64, 128, 256, 512], 64, size=16) - 3 * 9 * 64 * 16**2 + 3 * 49 * 64 * 32**2
    model = resnet18(DenseKind(), stem="imagenet")
    assert ideal_macs(model, (3, 64, 64)) == dense
    assert executed_macs(model, (3, 64, 64)) == dense


def test_cost_is_in_billions_beside_the_parameters():
    found = cost(resnet18(DenseKind()), CIFAR)
    assert found.params == 11_173_962
    assert found.gmacs_ideal == pytest.approx(0.55542272)
    assert found.gmacs_executed == pytest.approx(0.55542272)


def test_counting_leaves_the_model_as_it_was():
    model = resnet18(MoEKind(0.2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost(model, CIFAR)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

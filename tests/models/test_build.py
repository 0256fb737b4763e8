"""Added backbones: which kinds of network they can be, and the errors for other kinds."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from advmoe.config import ModelConfig, RunConfig
from advmoe.data.fashion_mnist import SPEC
from advmoe.errors import UserError
from advmoe.models import MODELS, NoSuchForm, build_model
from advmoe.models.resnet import ResNet
from advmoe.moe import DenseKind, MaskedKind, MoEKind, convert
from advmoe.runs.cost import dense_cost, dense_estimate

pytestmark = pytest.mark.usefixtures("registries")
CONFIG = ModelConfig(backbone="mine")


def plain(width):
    layers = [
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.BatchNorm2d(2 * width),
    ]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def register(make):
    MODELS["mine"] = (lambda kind, spec, *, width, stem: make(kind, plain(width)), 8)


X = torch.rand(1, 1, 28, 28)


def only_routed(kind, model):
    return convert(model, kind.num_experts, kind.scale, example_input=X)


def test_a_converted_backbone_is_of_every_kind_but_masked():
    register(lambda kind, model: convert(model, kind=kind, example_input=X))
    for kind in (DenseKind(), DenseKind(0.5), MoEKind(), MoEKind(0.5, 3, "disjoint", "per_network", "shared")):
        model = build_model(CONFIG, kind, SPEC)
        assert (bool(model.moe_layers()), model.num_classes) == (isinstance(kind, MoEKind), 10)
    with pytest.raises(UserError, match="no masks for at_sparse"):
        build_model(CONFIG, MaskedKind(0.5), SPEC)
    with pytest.raises(UserError, match="has no stages: routers must be per_layer or per_network"):
        build_model(CONFIG, MoEKind(routers="per_stage"), SPEC)


def test_a_kind_that_a_backbone_cannot_be_is_refused_in_one_line():
    register(only_routed)
    assert build_model(CONFIG, MoEKind(), SPEC).moe_layers()
    cases = {
        "has no dense form, .*: it reads kind.num_experts": DenseKind(),
        "has no masks, .*": MaskedKind(),
        "ignores bank disjoint: give the kind to convert": MoEKind(0.7, bank="disjoint"),
        "ignores routers per_network": MoEKind(routers="per_network"),
        "ignores routers per_stage: call begin_stage": MoEKind(routers="per_stage"),
        "ignores norms shared": MoEKind(norms="shared"),
        "ignores activation silu: make its activations by kind.nonlinearity()": MoEKind(activation="silu"),
    }
    for message, kind in cases.items():
        with pytest.raises(NoSuchForm, match=f"backbone 'mine' {message}"):
            build_model(CONFIG, kind, SPEC)
    register(lambda kind, model: convert(model, getattr(kind, "num_experts", 1), kind.scale, example_input=X))
    with pytest.raises(NoSuchForm, match="has no dense form"):
        build_model(CONFIG, DenseKind(), SPEC)
    register(lambda kind, model: model)
    with pytest.raises(UserError, match="must be a Classifier or what convert\\(\\) returns, not Sequential"):
        build_model(CONFIG, DenseKind(), SPEC)


def test_a_first_stage_that_does_not_begin_with_block_0_is_refused_for_routers_of_stages():
    class Late(ResNet):
        def begin_stage(self, kind, inputs, block):
            super().begin_stage(kind, inputs, block + 1)

    MODELS["mine"] = (partial(Late, blocks=(1, 1)), 8)
    assert build_model(CONFIG, MoEKind(), SPEC).moe_layers()
    with pytest.raises(UserError, match="per_stage: the first stage of Late begins with block 1, not 0; call begin_stage before"):
        build_model(CONFIG, MoEKind(routers="per_stage"), SPEC)


def test_arguments_of_earlier_versions_are_refused_with_the_present_ones():
    MODELS["mine"] = (lambda kind, *, width, stem, num_classes, mean, std: None, 8)
    with pytest.raises(UserError, match=r"backbone 'mine' must accept \(kind, spec, \*, width, stem\): .*; `spec`, the ImageSpec"):
        build_model(CONFIG, DenseKind(), SPEC)


def test_mistakes_of_the_backbone_itself_are_not_hidden():
    register(lambda kind, model: model.nothing)
    with pytest.raises(AttributeError, match="nothing"):
        build_model(CONFIG, DenseKind(), SPEC)


def test_without_a_dense_form_the_dense_cost_is_one_full_expert_without_router():
    run = RunConfig(method="advmoe", model=CONFIG)
    run = run.replace(data=run.data.replace(dataset="fashion-mnist"))
    register(lambda kind, model: convert(model, kind=kind, example_input=X))
    expected = dense_cost(run, SPEC)
    register(only_routed)
    counted = dense_cost(run, SPEC)
    assert counted.gmacs_ideal == pytest.approx(expected.gmacs_ideal)
    assert dense_estimate(run).gmacs == pytest.approx(expected.gmacs_ideal)


@pytest.mark.parametrize("case", ["densenet40 cifar 4", "densenet121 cifar 8", "densenet121 imagenet 29"])
def test_the_smallest_image_size_works_and_a_smaller_one_is_refused(case):
    backbone, stem, least = *case.split()[:2], int(case.split()[2])
    config = ModelConfig(backbone=backbone, stem=stem, width=2)
    model = build_model(config, DenseKind(), replace(SPEC, shape=(1, least, least))).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 1, least, least)).shape == (1, 10)
    message = f"'{backbone}' (stem {stem}) takes images of at least {least} pixels a side, not {least - 1}x40"
    with pytest.raises(UserError, match=re.escape(message)):
        build_model(config, DenseKind(), replace(SPEC, shape=(1, least - 1, 40)))


@pytest.mark.parametrize("backbone", ["resnet18", "wrn28_10", "vgg16_bn"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_the_other_backbones_take_images_of_one_pixel(backbone, stem):
    model = build_model(ModelConfig(backbone=backbone, stem=stem, width=10), DenseKind(), replace(SPEC, shape=(1, 1, 1))).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 1, 1, 1)).shape == (1, 10)

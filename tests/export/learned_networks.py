"""Networks for the tests of exports: small, in eval mode, with norms and filters as if they had been trained."""

from copy import deepcopy
from functools import cache

import torch
from small_backbone import SMALL, SMALLEST
from torch import nn

from advmoe.config import ModelConfig
from advmoe.data import ImageSpec
from advmoe.models import build_model
from advmoe.moe import DenseKind, ExpertNorm, MoEKind

SPEC = ImageSpec(("a", "b", "c"), (3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
GREY = ImageSpec(tuple("abcdefghij"), (1, 28, 28), (0.3,), (0.35,))
WIDTHS = {"resnet18": 8, "wrn28_10": 20, "vgg16_bn": 8, SMALL: 8, SMALLEST: 8, "densenet40": 4, "densenet121": 4}
KINDS = [
    DenseKind(0.5),
    MoEKind(0.5, 2),
    MoEKind(0.75, 3, norms="shared", activation="silu"),
    MoEKind(0.5, 3, "disjoint", "per_network"),
]


def noise(count):
    """Images of noise, some dark and some bright, so that routers choose different experts for them."""
    return torch.rand(count, *SPEC.shape) ** torch.logspace(-1, 1, count)[:, None, None, None]


def learned(kind, backbone="resnet18", spec=SPEC):
    """A network in eval mode. Its experts, norms and running statistics differ from their initial values.

    It also sets the state of the global random numbers, so that those drawn after it are always the same."""
    model, state = _learned(kind, backbone, spec)
    torch.set_rng_state(state)
    return deepcopy(model)


@cache
def _learned(kind, backbone, spec):
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone=backbone, width=WIDTHS[backbone]), kind, spec).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | ExpertNorm):
                module.momentum = None  # a plain mean
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
        for layer in model.moe_layers():
            nn.init.normal_(layer.filters, std=0.1)
        for _ in range(3):
            model(torch.rand(32, *spec.shape) ** torch.logspace(-1, 1, 32)[:, None, None, None])
    return model.eval(), torch.get_rng_state()

"""Copies of networks whose weights are computed in each forward pass."""

import pytest
import torch
from torch.nn.utils import weight_norm

from advmoe.config import ModelConfig
from advmoe.data.fashion_mnist import SPEC
from advmoe.models import build_model, compact
from advmoe.moe import MoEKind
from advmoe.training.ema import Ema


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_networks_with_computed_weights_are_averaged_and_compacted() -> None:
    model = build_model(ModelConfig(backbone="vgg16_bn", width=4), MoEKind(0.5, num_experts=2), SPEC).eval()
    weight_norm(model.classifier)
    x = torch.rand(2, *SPEC.shape)
    for copy in (Ema(model, 0.9).model, compact(model)):
        assert torch.equal(copy(x), model(x))

"""The parts of a backbone that other programs use."""

import pytest
import torch

from advmoe.config import ModelConfig
from advmoe.data.fashion_mnist import SPEC
from advmoe.models import MODELS, build_model
from advmoe.moe import MoEKind


@pytest.mark.parametrize("backbone", ["resnet18", "wrn28_10", "vgg16_bn", "densenet40"])
def test_grad_cam_hooks_the_feature_maps(backbone):
    """GradCAM by hand: the classifier's weights are the gradients of the mean feature maps."""
    assert backbone in MODELS
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone=backbone, width=10), MoEKind(), SPEC).eval()
    outputs = []
    handle = model.feature_maps.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    logits = model(torch.rand(2, *SPEC.shape))
    handle.remove()
    (maps,) = outputs
    (gradients,) = torch.autograd.grad(logits[:, 3].sum(), maps)
    torch.testing.assert_close(gradients.sum(dim=(2, 3)), model.classifier.weight[3].expand(2, -1))
    assert (gradients * maps).sum(dim=1).relu().shape == (2, *maps.shape[2:])

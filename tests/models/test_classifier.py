"""What every backbone offers to other programs."""

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
    kept = []
    handle = model.feature_maps.register_forward_hook(lambda module, given, output: kept.append(output))
    logits = model(torch.rand(2, *SPEC.shape))
    handle.remove()
    (maps,) = kept
    (slopes,) = torch.autograd.grad(logits[:, 3].sum(), maps)
    torch.testing.assert_close(slopes.sum(dim=(2, 3)), model.classifier.weight[3].expand(2, -1))
    assert (slopes * maps).sum(dim=1).relu().shape == (2, *maps.shape[2:])

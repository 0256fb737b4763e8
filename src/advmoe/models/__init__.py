"""Backbones: name -> constructor. Each takes the kind of its convolutions, so all kinds of network share one file a family."""

from collections.abc import Callable
from functools import partial

from advmoe.config import ModelConfig
from advmoe.data import ImageSpec
from advmoe.errors import lookup
from advmoe.models.classifier import Classifier
from advmoe.models.densenet import DenseNet
from advmoe.models.fused import fused
from advmoe.models.masked import compact, start_scores
from advmoe.models.resnet import ResNet
from advmoe.models.vgg import VGG
from advmoe.models.wrn import WideResNet
from advmoe.moe import DenseKind

MODELS: dict[str, tuple[Callable[..., Classifier], int]] = {  # and the published width
    "resnet18": (partial(ResNet, blocks=(2, 2, 2, 2)), 64),
    "wrn28_10": (partial(WideResNet, blocks=4), 160),
    "vgg16_bn": (partial(VGG, convolutions=(2, 2, 3, 3, 3)), 64),
    "densenet40": (partial(DenseNet, layers=(6, 6, 6)), 12),
    "densenet121": (partial(DenseNet, layers=(6, 12, 24, 16)), 32),
}


def build_model(config: ModelConfig, kind: DenseKind, spec: ImageSpec) -> Classifier:
    """The backbone that `config` names, of convolutions of `kind`, for images of `spec`.

    Raises UserError on an unknown backbone and where the model scale leaves a layer no channel.
    """
    make, width = lookup(MODELS, config.backbone, "backbone")
    model = make(kind, width=config.width or width, stem=config.stem, num_classes=len(spec.classes), mean=spec.mean, std=spec.std)
    start_scores(model)
    return model


__all__ = ["MODELS", "Classifier", "build_model", "compact", "fused", "start_scores"]

"""Backbones: name -> constructor. Each takes the kind of its convolutions, so dense and MoE share one file a family."""

from collections.abc import Callable
from functools import partial

from advmoe.config import ModelConfig
from advmoe.data import PictureSpec
from advmoe.errors import lookup
from advmoe.models.classifier import Classifier
from advmoe.models.resnet import ResNet
from advmoe.moe import Kind

MODELS: dict[str, Callable[..., Classifier]] = {
    "resnet18": partial(ResNet, blocks=(2, 2, 2, 2)),
}


def build_model(config: ModelConfig, kind: Kind, spec: PictureSpec) -> Classifier:
    """The backbone that `config` names, of convolutions of `kind`, for pictures of `spec`.

    Raises UserError on an unknown backbone and where the model scale leaves a layer no channel.
    """
    make = lookup(MODELS, config.backbone, "backbone")
    return make(kind, width=config.width, stem=config.stem, num_classes=len(spec.classes), mean=spec.mean, std=spec.std)


__all__ = ["MODELS", "Classifier", "build_model"]

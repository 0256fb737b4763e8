"""The backbones by name, and `build_model`, which builds one.

Each constructor takes (kind, spec, *, width, stem). The `kind` (dense, masked, MoE) makes its convolutions, so one class serves
all kinds of network. `spec` describes its images.
"""

import inspect
from collections.abc import Callable
from functools import partial

from torch import nn

from advmoe.config import ModelConfig
from advmoe.data import ImageSpec
from advmoe.entries import Entries
from advmoe.errors import UserError, lookup
from advmoe.models.classifier import Classifier
from advmoe.models.densenet import DenseNet
from advmoe.models.masked import start_scores
from advmoe.models.resnet import ResNet
from advmoe.models.vgg import VGG
from advmoe.models.wrn import WideResNet
from advmoe.moe import DenseKind, ExpertNorm, MaskedKind, MoEKind, RoutedNetwork
from advmoe.moe.experts import windows

MODELS: Entries[tuple[Callable[..., Classifier], int]] = Entries({  # name -> constructor, published width
    "resnet18": (partial(ResNet, blocks=(2, 2, 2, 2)), 64),
    "wrn28_10": (partial(WideResNet, blocks=4), 160),
    "vgg16_bn": (partial(VGG, convolutions=(2, 2, 3, 3, 3)), 64),
    "densenet40": (partial(DenseNet, layers=(6, 6, 6)), 12),
    "densenet121": (partial(DenseNet, layers=(6, 12, 24, 16)), 32),
})  # fmt: skip


class NoSuchForm(UserError):
    """A backbone that is not available for the kind of network that a method asks for."""


def build_model(config: ModelConfig, kind: DenseKind, spec: ImageSpec) -> Classifier:
    """Build the backbone that `config` names, with convolutions made by `kind`, for images of `spec`.

    Raises UserError if the backbone is unknown, if the model scale leaves a layer without channels, or if the images are too
    small. For a backbone that a user added, raises UserError if it takes other arguments, and NoSuchForm if it does not support
    `kind`.
    """
    entry = lookup(MODELS, config.backbone, "backbone")
    if not isinstance(entry, tuple) or len(entry) != 2:
        raise UserError(f"backbone '{config.backbone}' must be a pair in MODELS: (constructor, default width)")
    constructor, width = entry
    _check_signature(config.backbone, constructor)
    try:
        model = constructor(kind, spec, width=config.width or width, stem=config.stem)
    except AttributeError as error:
        if error.obj is not kind:
            raise
        reason = f"it reads kind.{error.name}, which {type(kind).__name__} does not have"
        raise NoSuchForm(f"backbone '{config.backbone}' {_lacks(kind)}: {reason}") from None
    _check_form(config.backbone, model, kind)
    if min(spec.shape[1:]) < model.min_size:
        size = f"{spec.shape[1]}x{spec.shape[2]}"
        raise UserError(
            f"backbone '{config.backbone}' (stem {config.stem}) takes images of at least {model.min_size} pixels a side, not {size}"
        )
    start_scores(model)
    return model


def _check_signature(name: str, constructor: Callable[..., Classifier]) -> None:
    """Raises UserError if the backbone does not accept the arguments of `build_model`."""
    try:
        inspect.signature(constructor).bind("kind", "spec", width=1, stem="cifar")
    except TypeError as error:
        raise UserError(
            f"backbone '{name}' must accept (kind, spec, *, width, stem): {error}; "
            "`spec`, the ImageSpec of the images, replaces num_classes, mean and std of earlier versions"
        ) from None


def _lacks(kind: DenseKind) -> str:
    """What a backbone that does not support the kind lacks."""
    if isinstance(kind, MoEKind):
        return "has no experts, which at_moe and advmoe train"
    if isinstance(kind, MaskedKind):
        return "has no masks, which at_sparse trains"
    return "has no dense form, which at_dense, at_small_dense and standard train"


def _check_form(name: str, model: nn.Module, kind: DenseKind) -> None:
    """Raises UserError if the backbone is not a RoutedNetwork, and NoSuchForm if it does not support `kind`."""
    if not isinstance(model, RoutedNetwork):
        raise UserError(f"backbone '{name}' must be a Classifier or what convert() returns, not {type(model).__name__}")
    if not hasattr(model, "masks"):
        raise UserError(f"backbone '{name}' must call self.finish(channels of the last layer) at the end of its constructor")
    layers = model.moe_layers()
    if bool(layers) != isinstance(kind, MoEKind) or bool(model.masks) != isinstance(kind, MaskedKind):
        raise NoSuchForm(f"backbone '{name}' {_lacks(kind)}")
    if kind.activation == "silu" and not any(isinstance(module, nn.SiLU) for module in model.modules()):
        raise NoSuchForm(f"backbone '{name}' ignores activation silu: make its activations by kind.nonlinearity()")
    if isinstance(kind, MoEKind):
        routers = "per_network" if model.router is not None else "per_stage" if model.stage_routers else "per_layer"
        disjoint = (windows("disjoint", kind.num_experts, 0, layer.width).starts == layer.starts for layer in layers)
        used = {
            "num_experts": all(layer.num_experts == kind.num_experts for layer in layers),
            "bank": kind.bank == "backbone" or all(disjoint),
            "routers": kind.routers == routers,
            "norms": kind.norms == "per_expert" or not any(isinstance(layer.norm, ExpertNorm) for layer in layers),
        }
        for field, is_used in used.items():
            if not is_used:
                value = getattr(kind, field)
                how = "call begin_stage" if value == "per_stage" else "give the kind to convert(model, kind=kind, ...)"
                raise NoSuchForm(f"backbone '{name}' ignores {field} {value}: {how}")

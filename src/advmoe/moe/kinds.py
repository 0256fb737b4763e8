"""The kinds of network: dense, masked or MoE. A kind makes the channels, norms and convolutions of a backbone."""

from dataclasses import dataclass, field
from typing import Any, get_args

from torch import nn

from advmoe.config.choices import Activation, Bank, Norms, Routers
from advmoe.errors import UserError
from advmoe.moe.channels import ChannelMask, Channels
from advmoe.moe.conv import DenseConv2d, MoEConv2d, PlainConv2d
from advmoe.moe.experts import windows
from advmoe.moe.network_router import NetworkRouter
from advmoe.moe.norm import ExpertNorm, MaskedNorm
from advmoe.moe.routing import Router


@dataclass(frozen=True)
class DenseKind:
    """Plain convolutions: the dense network if `scale` is 1, a small dense network if it is less.

    Raises UserError if `scale` is not in (0, 1] or `activation` is unknown.
    """

    scale: float = 1.0
    activation: Activation = field(default="relu", kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise UserError(f"model_scale must be in (0, 1], not {self.scale}")
        _check_names(self, activation=Activation)

    def channels(self, full: int) -> Channels:
        """The channels of a layer that has `full` channels in the dense network. Raises UserError if `scale` leaves none."""
        return Channels(full, scaled(full, self.scale))

    def stem_channels(self, full: int) -> Channels:
        """As `channels`, for the first convolution of a ResNet."""
        return self.channels(full)

    def norm(self, channels: Channels) -> nn.Module:
        """Batch norm for `channels`. It sets masked channels to zero."""
        return MaskedNorm(channels) if channels.masks else nn.BatchNorm2d(channels.width)

    def nonlinearity(self) -> nn.Module:
        """The activation after a convolution or a norm. Both kinds map 0 to 0, so masked channels stay zero."""
        return nn.ReLU(inplace=True) if self.activation == "relu" else nn.SiLU()

    def plain(self, inputs: Channels, outputs: Channels, kernel_size: int = 3, stride: int = 1, *, norm: bool = True) -> nn.Module:
        """A convolution that is not routed in any kind: stem, shortcut or transition. Its forward is x -> y."""
        return PlainConv2d(inputs, outputs, kernel_size, stride, self.norm(outputs) if norm else None)

    def conv(self, inputs: Channels, outputs: Channels, kernel_size: int = 3, stride: int = 1, *, norm: bool = True) -> nn.Module:
        """A convolution inside a block, followed by batch norm if `norm`. Its forward is (x, gate, logits) -> (y, routings)."""
        return DenseConv2d(inputs, outputs, kernel_size, stride, self.norm(outputs) if norm else None)

    def network_router(self, in_channels: int, stem: str) -> nn.Module | None:
        """The one router that all layers share, or None if the kind has none. Its images have `in_channels` channels."""
        return None

    def stage_router(self, inputs: Channels) -> nn.Module | None:
        """The router that the layers of a stage share, or None if the kind has none. It sees the stage's input."""
        return None


@dataclass(frozen=True)
class MaskedKind(DenseKind):
    """The dense network with channel masks. Each mask keeps a fraction `scale` of a layer's channels."""

    def channels(self, full: int) -> Channels:
        return Channels(full, full, (ChannelMask(full, scaled(full, self.scale)),))


@dataclass(frozen=True)
class MoEKind(DenseKind):
    """Routed convolutions. The stem of a ResNet keeps its dense width.

    Raises UserError if `num_experts` is less than 1 or another field has an unknown value.
    """

    num_experts: int = 2
    bank: Bank = "backbone"
    routers: Routers = "per_layer"
    norms: Norms = "per_expert"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts < 1:
            raise UserError(f"num_experts must be at least 1, not {self.num_experts}")
        _check_names(self, bank=Bank, routers=Routers, norms=Norms)

    def stem_channels(self, full: int) -> Channels:
        return Channels(full, full)

    def conv(self, inputs: Channels, outputs: Channels, kernel_size: int = 3, stride: int = 1, *, norm: bool = True) -> nn.Module:
        experts = windows(self.bank, self.num_experts, outputs.full, outputs.width)
        norm_layer = None
        if norm:
            norm_layer = self.norm(outputs) if self.norms == "shared" else ExpertNorm(self.num_experts, outputs.width)
        routed = self.routers == "per_layer"
        return MoEConv2d(inputs, experts, kernel_size=kernel_size, stride=stride, norm=norm_layer, routed=routed)

    def network_router(self, in_channels: int, stem: str) -> nn.Module | None:
        return NetworkRouter(in_channels, self.num_experts, stem) if self.routers == "per_network" else None

    def stage_router(self, inputs: Channels) -> nn.Module | None:
        return Router(inputs.width, self.num_experts) if self.routers == "per_stage" else None


def _check_names(kind: DenseKind, **choices: Any) -> None:
    """Raises UserError if a field of `kind` has a value that its Literal type does not list."""
    for name, choice in choices.items():
        if getattr(kind, name) not in get_args(choice):
            raise UserError(f"{name} must be one of {', '.join(get_args(choice))}, not {getattr(kind, name)}")


def scaled(channels: int, scale: float) -> int:
    """scale * channels, rounded down. Raises UserError if that is 0."""
    kept = int(scale * channels + 1e-9)  # 1e-9: 0.2 * 15 is 3.0000000000000004, 0.29 * 100 is 28.999999999999996
    if kept < 1:
        raise UserError(f"model_scale {scale} leaves a layer of {channels} channels none: at least {1 / channels:.3g} is needed")
    return kept

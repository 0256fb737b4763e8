"""Sparse mixture-of-experts convolutions: routers, gates and dispatch; and the dense and masked layers to compare with."""

from typing import TYPE_CHECKING

from advmoe.moe.balance import balance
from advmoe.moe.channels import ChannelMask, Channels, images
from advmoe.moe.conv import DenseConv2d, MoEConv2d, PlainConv2d, Routings
from advmoe.moe.convert import Converted, convert
from advmoe.moe.dispatch import DISPATCHES, check_dispatch
from advmoe.moe.kinds import DenseKind, MaskedKind, MoEKind
from advmoe.moe.network import RoutedNetwork, check_routings
from advmoe.moe.norm import ExpertNorm, MaskedNorm, synchronise, update_norms
from advmoe.moe.routing import (
    GATES,
    HARD,
    MOMENTUM,
    Chosen,
    ForcedGate,
    Gate,
    HardGate,
    Mixed,
    OneHot,
    Router,
    Routing,
    Scaled,
    ScaledGate,
    SoftGate,
    StraightThroughGate,
    check_gate,
    make_gate,
)  # fmt: skip
from advmoe.moved import getter

__all__ = [
    "DISPATCHES", "GATES", "HARD", "MOMENTUM", "ChannelMask", "Channels", "Chosen", "Converted", "DenseConv2d", "DenseKind",
    "ExpertNorm", "ForcedGate", "Gate", "HardGate", "MaskedKind", "MaskedNorm", "Mixed", "MoEConv2d", "MoEKind",
    "OneHot", "PlainConv2d", "RoutedNetwork", "Router", "Routing", "Routings", "Scaled", "ScaledGate", "SoftGate",
    "StraightThroughGate", "balance", "check_dispatch", "check_gate", "check_routings", "convert", "images", "make_gate",
    "synchronise", "update_norms",
]  # fmt: skip

if not TYPE_CHECKING:
    __getattr__ = getter(__name__)

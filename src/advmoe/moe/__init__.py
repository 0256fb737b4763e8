"""Sparse mixture-of-experts convolutions: routers, gates, dispatch; and the plain and masked networks they compare with."""

from advmoe.moe.balance import balance
from advmoe.moe.channels import ChannelMask, Channels, images
from advmoe.moe.conv import DenseConv2d, MoEConv2d, PlainConv2d, Routings
from advmoe.moe.convert import Converted, convert
from advmoe.moe.dispatch import DISPATCHES, Dispatch, check_dispatch
from advmoe.moe.kinds import DenseKind, MaskedKind, MoEKind
from advmoe.moe.network import RoutedNetwork
from advmoe.moe.norm import ExpertNorm, MaskedNorm, synchronise
from advmoe.moe.routing import HARD, MOMENTUM, Gate, GateKind, Router, Routing

__all__ = [
    "DISPATCHES", "HARD", "MOMENTUM", "ChannelMask", "Channels", "Converted", "DenseConv2d", "DenseKind", "Dispatch", "ExpertNorm",
    "Gate", "GateKind", "MaskedKind", "MaskedNorm", "MoEConv2d", "MoEKind", "PlainConv2d", "RoutedNetwork", "Router", "Routing",
    "Routings", "balance", "check_dispatch", "convert", "images",
    "synchronise",
]  # fmt: skip

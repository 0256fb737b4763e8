"""Sparse mixture-of-experts convolutions: routers, gates, dispatch."""

from advmoe.moe.conv import DenseConv2d, DenseKind, Kind, MoEConv2d, MoEKind, Routings
from advmoe.moe.routing import HARD, Gate, GateKind, Router, Routing

__all__ = [
    "HARD", "DenseConv2d", "DenseKind", "Gate", "GateKind", "Kind", "MoEConv2d", "MoEKind", "Router", "Routing", "Routings",
]  # fmt: skip

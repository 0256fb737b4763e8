"""The places where a sweep can execute its runs: this machine, a Ray cluster, Slurm.

To add one, write a subclass of `Placement` and an entry of PLACEMENTS. Its module is imported only if it is used, because it may
need an extra.
"""

from importlib import import_module

from advmoe.errors import lookup
from advmoe.sweep.placements.base import Placement, Request

PLACEMENTS: dict[str, tuple[str, str]] = {  # name -> module, class
    "local": ("advmoe.sweep.placements.local", "LocalPlacement"),
    "ray": ("advmoe.sweep.placements.ray", "RayPlacement"),
    "slurm": ("advmoe.sweep.placements.slurm", "SlurmPlacement"),
}


def placement_class(name: str) -> type[Placement]:
    """The class of a placement. Raises UserError if it is unknown, or its extra is not installed."""
    module, kind = lookup(PLACEMENTS, name, "placement")
    placement: type[Placement] = getattr(import_module(module), kind)
    return placement


__all__ = ["PLACEMENTS", "Placement", "Request", "placement_class"]

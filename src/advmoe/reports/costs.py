"""The cost of a network as a row and as lines."""

from pydantic import BaseModel

from advmoe.evaluation.cost import Cost, LayerCost
from advmoe.runs.cost import Estimate


class CostRow(BaseModel):
    """Parameters and GMACs of a network and of the dense one; `layers` is None unless requested."""

    params: int
    gmacs_ideal: float
    gmacs_executed: float
    gmacs_dense: float
    layers: tuple[LayerCost, ...] | None = None


def cost_row(network: Cost, dense: Estimate, layers: bool) -> CostRow:
    """Parameters and GMACs of a network; with `layers`, those of each layer too."""
    return CostRow(
        params=network.params, gmacs_ideal=network.gmacs_ideal, gmacs_executed=network.gmacs_executed, gmacs_dense=dense.gmacs,
        layers=network.layers if layers else None,
    )  # fmt: skip


def cost_lines(network: Cost, dense: Estimate, layers: bool) -> list[str]:
    """The same as lines, the layers first."""
    total = [
        f"parameters       {network.params:,}",
        f"GMACs, ideal     {network.gmacs_ideal:.6f}",
        f"GMACs, executed  {network.gmacs_executed:.6f}",
        f"GMACs, dense     {dense.gmacs:.6f}",
        f"against dense    {100 * (network.gmacs_ideal / dense.gmacs - 1):+.1f} %",
    ]
    return [*_layer_lines(network), "", *total] if layers else total


def _layer_lines(network: Cost) -> list[str]:
    width = max(len(layer.name) for layer in network.layers)
    head = f"{'layer':{width}} {'parameters':>12} {'GMACs, ideal':>14} {'executed':>14}"
    rows = (f"{c.name:{width}} {c.params:12,} {c.gmacs_ideal:14.9f} {c.gmacs_executed:14.9f}" for c in network.layers)
    return [head, *rows]

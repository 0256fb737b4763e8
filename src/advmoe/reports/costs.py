"""Costs as text: the layers of a network, the costs of the recipes and of the backbones."""

from collections.abc import Iterable

from pydantic import BaseModel

from advmoe.evaluation.cost import Cost, LayerCost
from advmoe.recipes import RECIPES, recipe
from advmoe.reports.recipe_list import less
from advmoe.runs.cost import Estimate, dense_estimate, estimate

TABLE = (
    *(f"cifar10-{backbone}" for backbone in ("resnet18", "wrn28_10", "vgg16_bn", "densenet40")),
    *(f"imagenet-{backbone}" for backbone in ("resnet18", "wrn28_10", "vgg16_bn", "densenet121")),
)
KINDS = {"dense": "at_dense", "small dense": "at_small_dense", "MoE": "advmoe"}


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


def recipe_table(names: Iterable[str]) -> list[str]:
    """The lines of the table of recipes' costs (`advmoe.reports.recipe_list`), counted on the networks' shapes."""
    costs = {name: (estimate(RECIPES[name]), dense_estimate(RECIPES[name])) for name in names}
    rows = (f"{name},{network.params},{network.gmacs!r},{dense.params},{dense.gmacs!r}" for name, (network, dense) in costs.items())
    return ["recipe,params,gmacs,params_dense,gmacs_dense", *rows]


def profile_markdown() -> str:
    """Parameters and GMACs of every backbone, dense, small dense and with experts, at r = 0.5 and N = 2, as a Markdown table."""
    head = ["| images, backbone | network | parameters | GMACs | against dense |", "| --- | --- | ---: | ---: | ---: |"]
    return "\n".join([*head, *(_markdown_row(backbone, title) for backbone in TABLE for title in KINDS)])


def _markdown_row(name: str, title: str) -> str:
    config = recipe(f"{name}-{KINDS[title]}")
    network, dense = estimate(config), dense_estimate(config)
    versus = "" if network == dense else f"{-less(network.gmacs, dense.gmacs):+.1f} %"
    dataset, _, backbone = name.partition("-")
    return f"| {dataset}, {backbone} | {title} | {network.params / 1e6:.2f} M | {network.gmacs:.3f} | {versus} |"

"""Costs as text: the layers of a network, the paper's cost columns beside the counted costs, the costs of the recipes."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from pydantic import BaseModel

from advmoe.evaluation.cost import Cost, LayerCost
from advmoe.paper import Cell, cells
from advmoe.recipes import RECIPES, recipe
from advmoe.reports.recipe_list import less
from advmoe.runs.cost import Estimate, dense_estimate, estimate

HALF_UNIT = 0.005  # of the last digit that the tables print
COUNT_SHARE = 0.01
PLAIN = ("at_small_dense", "at_sparse")
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


@dataclass(frozen=True)
class Judged:
    """A printed cell, its counted cost in GMACs, the reduction against dense in percent, and the reasons why the cell must be wrong
    (empty if it can be right)."""

    cell: Cell
    counted: float
    counted_reduction: float
    reasons: tuple[str, ...]


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


def judged_cells() -> list[Judged]:
    """The paper's cost columns beside the counted costs, each cell checked by the three rules below."""
    return [_judged(cell) for cell in cells()]


def _judged(cell: Cell) -> Judged:
    network, dense = estimate(recipe(cell.recipe)), dense_estimate(recipe(cell.recipe))
    reasons = (_miscounted(cell, network, dense), _impossible_router(cell), _misdivided(cell))
    return Judged(cell, network.gmacs, less(network.gmacs, dense.gmacs), tuple(reason for reason in reasons if reason))


def _miscounted(cell: Cell, network: Estimate, dense: Estimate) -> str | None:
    """Rule 1: the printed cost may differ from the count by rounding and by the share COUNT_SHARE of the count."""
    if abs(cell.gflops - network.gmacs) <= HALF_UNIT + COUNT_SHARE * network.gmacs:
        return None
    message = f"{cell.model} {'with experts ' if cell.method not in (*PLAIN, 'at_dense') else ''}at r = {cell.model_scale:g}"
    message += f" counts {network.gmacs:.3f} GMACs, not {cell.gflops:g}"
    if cell.reduction is None:
        return message
    law = "cost goes with r squared: " if cell.method in PLAIN else ""
    return f"{message}: {law}{less(network.gmacs, dense.gmacs):.0f} % less than dense, not {cell.reduction:.0f} %"


def _impossible_router(cell: Cell) -> str | None:
    """Rule 2: the difference between a cell with experts and the small dense network at the same scale is the cost of the router.
    It must be the same at all scales, within the rounding of the four figures."""
    if cell.method in (*PLAIN, "at_dense"):
        return None
    implied = _implied_routers(cell)
    if max(implied.values()) - min(implied.values()) <= 4 * HALF_UNIT + 1e-9:
        return None
    message = ", ".join(f"{router:.2f} at r = {scale:g}" for scale, router in implied.items())
    return f"{cell.model}'s cells with experts imply routers of {message}, but one router must cost the same at all scales"


def _implied_routers(cell: Cell) -> dict[float, float]:
    """Scale -> printed GFLOPS of `cell`'s method minus those of the small dense network, for the same model."""
    scales = sorted({c.model_scale for c in cells() if c.model_scale < 1})
    printed = {
        (scale, method): next(c.gflops for c in cells() if _at(c, cell.model, scale, method))
        for scale in scales
        for method in (cell.method, "at_small_dense")
    }
    return {scale: printed[scale, cell.method] - printed[scale, "at_small_dense"] for scale in scales}


def _at(cell: Cell, model: str, scale: float, method: str) -> bool:
    return (cell.model, cell.model_scale, cell.method) == (model, scale, method)


def _misdivided(cell: Cell) -> str | None:
    """Rule 3: the printed reduction must follow from the printed costs, within the rounding of all three."""
    if cell.reduction is None:
        return None
    dense = next(c.gflops for c in cells() if c.table == cell.table and _at(c, cell.model, 1.0, "at_dense"))
    least = less(cell.gflops + HALF_UNIT, dense - HALF_UNIT) - 0.5
    most = less(cell.gflops - HALF_UNIT, dense + HALF_UNIT) + 0.5
    if least <= cell.reduction <= most:
        return None
    return f"{cell.gflops:g} is {less(cell.gflops, dense):.0f} % less than {dense:g}, not {cell.reduction:.0f} %"


def judged_rows(judged: Iterable[Judged]) -> list[dict[str, object]]:
    """Printed cells and counts as rows for JSON."""
    return [
        asdict(entry.cell) | {
            "recipe": entry.cell.recipe, "gmacs_counted": entry.counted, "reduction_counted": entry.counted_reduction,
            "possible": not entry.reasons, "reasons": list(entry.reasons),
        }
        for entry in judged
    ]  # fmt: skip


def judged_lines(judged: list[Judged]) -> list[str]:
    """One line for each cell, with the numbers of the reasons if it cannot be right; then the reasons."""
    numbers: dict[str, int] = {}
    for entry in judged:
        for reason in entry.reasons:
            numbers.setdefault(reason, len(numbers) + 1)
    head = f"{'table':5} {'model':8} {'r':>4} {'method':14} {'printed':>7} {'counted':>16}"
    rows = [f"{_judged_line(entry)} {' '.join(f'[{numbers[reason]}]' for reason in entry.reasons)}".rstrip() for entry in judged]
    rules = (
        f"GMACs of one image, and the reduction against dense. A number in brackets means that the cell cannot be right: it "
        f"differs from the count by more than its rounding and {COUNT_SHARE:.0%}, or it contradicts other printed cells."
    )
    return [head, *rows, "", rules, *(f"[{number}] {reason}" for reason, number in numbers.items())]


def _judged_line(entry: Judged) -> str:
    cell = entry.cell
    printed = "" if cell.reduction is None else f"-{cell.reduction:.0f} %"
    counted = "" if cell.reduction is None else f"-{entry.counted_reduction:.0f} %"
    position = f"{cell.table:5} {cell.model:8} {cell.model_scale:4g} {cell.method:14}"
    return f"{position} {cell.gflops:7.2f} {printed:>7}  {entry.counted:7.3f} {counted:>6} "


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

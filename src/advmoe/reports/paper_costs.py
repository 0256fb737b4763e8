"""The cost columns of the paper's tables beside the counted costs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from advmoe.paper import PrintedCell, printed_cells
from advmoe.recipes import recipe
from advmoe.reports.cell import is_routed
from advmoe.reports.recipe_list import less
from advmoe.runs.cost import Estimate, dense_estimate, estimate

HALF_UNIT = 0.005  # of the last digit that the tables print
COUNT_SHARE = 0.01
PLAIN = ("at_small_dense", "at_sparse")


@dataclass(frozen=True)
class Judged:
    """A printed cell, its counted cost in GMACs, the reduction against dense in percent, and the reasons why the cell must be wrong
    (empty if it can be right)."""

    cell: PrintedCell
    counted: float
    counted_reduction: float
    reasons: tuple[str, ...]


def judged_cells() -> list[Judged]:
    """The paper's cost columns beside the counted costs, each cell checked by the three rules below."""
    return [_judged(cell) for cell in printed_cells()]


def _judged(cell: PrintedCell) -> Judged:
    network, dense = estimate(recipe(cell.recipe)), dense_estimate(recipe(cell.recipe))
    reasons = (_miscounted(cell, network, dense), _impossible_router(cell), _misdivided(cell))
    return Judged(cell, network.gmacs, less(network.gmacs, dense.gmacs), tuple(reason for reason in reasons if reason))


def _miscounted(cell: PrintedCell, network: Estimate, dense: Estimate) -> str | None:
    """Rule 1: the printed cost may differ from the count by rounding and by the share COUNT_SHARE of the count."""
    if abs(cell.gflops - network.gmacs) <= HALF_UNIT + COUNT_SHARE * network.gmacs:
        return None
    message = f"{cell.model} {'with experts ' if is_routed(cell.method) else ''}at r = {cell.model_scale:g}"
    message += f" counts {network.gmacs:.3f} GMACs, not {cell.gflops:g}"
    if cell.reduction is None:
        return message
    law = "cost goes with r squared: " if cell.method in PLAIN else ""
    return f"{message}: {law}{less(network.gmacs, dense.gmacs):.0f} % less than dense, not {cell.reduction:.0f} %"


def _impossible_router(cell: PrintedCell) -> str | None:
    """Rule 2: the difference between a cell with experts and the small dense network at the same scale is the cost of the router.
    It must be the same at all scales, within the rounding of the four figures."""
    if not is_routed(cell.method):
        return None
    implied = _implied_routers(cell)
    if max(implied.values()) - min(implied.values()) <= 4 * HALF_UNIT + 1e-9:
        return None
    message = ", ".join(f"{router:.2f} at r = {scale:g}" for scale, router in implied.items())
    return f"{cell.model}'s cells with experts imply routers of {message}, but one router must cost the same at all scales"


def _implied_routers(cell: PrintedCell) -> dict[float, float]:
    """Scale -> printed GFLOPS of `cell`'s method minus those of the small dense network, for the same model."""
    printed = {(c.model_scale, c.method): c.gflops for c in printed_cells() if c.model == cell.model and c.model_scale < 1}
    return {scale: printed[scale, cell.method] - printed[scale, "at_small_dense"] for scale in sorted({s for s, _ in printed})}


def _misdivided(cell: PrintedCell) -> str | None:
    """Rule 3: the printed reduction must follow from the printed costs, within the rounding of all three."""
    if cell.reduction is None:
        return None
    dense = next(c.gflops for c in printed_cells() if (c.table, c.model, c.method) == (cell.table, cell.model, "at_dense"))
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

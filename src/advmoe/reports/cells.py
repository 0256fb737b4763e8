"""Records of one cell as one figure each: means and deviations over seeds."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from advmoe.evaluation.evaluate import wilson
from advmoe.evaluation.record import autoattack_unreliable
from advmoe.reports.collect import Cell, cell_of, departures

ACCURACIES = ("sa", "ra_50", "ra_aa", "ra_worst", "ra_worst_quick")


@dataclass(frozen=True)
class Figure:
    """`mean` and sample deviation `std` (n - 1; None for a single value) of `values`, one a seed."""

    mean: float
    std: float | None
    n: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """A cell's `n` runs. `figures` has those of "sa", "ra_50", "ra_aa", "ra_worst", "ra_worst_quick" (percent), "gmacs" and
    "reduction" (percent less than dense) that any run measured, each over the runs that did.

    `departures` are the settings beside the cell's own that are not the default ones. `unreliable`: a run's RA-AA stands too far
    above its RA-worst to be believed.
    """

    cell: Cell
    n: int
    seeds: tuple[int, ...]
    figures: dict[str, Figure]
    departures: tuple[str, ...]
    unreliable: bool


def summarise(records: Iterable[Mapping[str, Any]]) -> list[Summary]:
    """One Summary a cell, in the order the cells come; `collect` gives Records with one run for each cell and seed."""
    cells: dict[Cell, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        cells[cell_of(record)].append(record)
    return [_summary(cell, runs) for cell, runs in cells.items()]


def _summary(cell: Cell, runs: Sequence[Mapping[str, Any]]) -> Summary:
    measured = [_measured(run) for run in runs]
    names = dict.fromkeys(name for figures in measured for name in figures)
    figures = {name: figure([own[name] for own in measured if name in own]) for name in names}
    unreliable = any(autoattack_unreliable(run["evaluation"]) for run in runs)
    return Summary(cell, len(runs), tuple(run["seed"] for run in runs), figures, departures(runs[0]), unreliable)


def _measured(record: Mapping[str, Any]) -> dict[str, float]:
    named = {name: record.get(name) for name in (*ACCURACIES, "gmacs", "reduction")} | {"ra_50": record["ra"].get("50")}
    return {name: float(value) for name, value in named.items() if value is not None}


def figure(values: Sequence[float]) -> Figure:
    """Mean and sample deviation of at least one value."""
    return Figure(fmean(values), stdev(values) if len(values) > 1 else None, len(values), tuple(values))


def worst_name(summaries: Iterable[Summary]) -> str:
    """The worst case that these can be compared in: "ra_worst" where any was fully attacked, else "ra_worst_quick"."""
    return "ra_worst" if any("ra_worst" in summary.figures for summary in summaries) else "ra_worst_quick"


def span(summary: Summary, name: str) -> tuple[float, float]:
    """Where an accuracy lies, in percent: the least interval that holds the 95 % Wilson interval of the mean on the test pictures
    and the mean plus and minus two sample deviations over seeds."""
    own = summary.figures[name]
    low, high = wilson(own.mean / 100, summary.cell.test_pictures)
    reach = 2 * (own.std or 0.0)
    return min(low, own.mean - reach), max(high, own.mean + reach)


def by_setting(summaries: Iterable[Summary]) -> dict[Cell, list[Summary]]:
    """Summaries that can be compared, in the order they come."""
    groups: dict[Cell, list[Summary]] = defaultdict(list)
    for summary in summaries:
        groups[summary.cell.setting].append(summary)
    return dict(groups)

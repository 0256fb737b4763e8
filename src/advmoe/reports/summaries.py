"""Records of each cell summarised: means and sample deviations over seeds."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Literal

from advmoe.attacks.presets import PRESETS
from advmoe.evaluation.record import Record
from advmoe.evaluation.results import wilson
from advmoe.reports.cell import Cell, cell_of, grouped, short_value
from advmoe.reports.measures import QUICK_OF_VERSION_0_1, SUMMARY, WORST, attacks_of, older_versions
from advmoe.reports.settings import departures, shared_settings

T_QUANTILES = (  # the 0.975 quantiles of Student's t distribution for 1 to 30 degrees of freedom
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

Outcome = Literal["ahead", "behind", "not apart", "one seed"]


@dataclass(frozen=True)
class Figure:
    """`mean` and sample deviation `std` (divisor n - 1; None for a single value) of `values`, one for each seed."""

    mean: float
    std: float | None
    n: int
    values: tuple[float, ...]

    def text(self, digits: int) -> str:
        """'36.2 ± 0.5'; the mean alone if there is no deviation."""
        return f"{self.mean:.{digits}f}" + ("" if self.std is None else f" ± {self.std:.{digits}f}")


@dataclass(frozen=True)
class Summary:
    """A cell's `n` runs. `figures` has each measure (`advmoe.reports.measures`) that any run has, over the runs that have it.

    `attacks`: worst case -> the attacks behind it, which are the same in every run. If the runs were attacked differently, the
    worst case is listed in `mixed` and not in `figures`. `departures` are settings that are no field of the cell and differ from
    the default. `shared` are the settings that must be equal in runs of other methods to be compared. `trained_by` is the code
    that trained the runs, each once, in words. `older` are the attacks of older versions, with these. `unreliable`: RA-AA of a run
    is too far above its RA-worst.
    """

    cell: Cell
    n: int
    seeds: tuple[int, ...]
    figures: dict[str, Figure]
    departures: tuple[str, ...]
    unreliable: bool
    attacks: dict[str, frozenset[str]]
    mixed: tuple[str, ...]
    shared: dict[str, object]
    trained_by: tuple[str, ...] = ()
    older: Mapping[str, int] = field(default_factory=dict)


def summarise(records: Iterable[Record]) -> list[Summary]:
    """One Summary for each cell, in order of first occurrence. Expects one Record for each cell and seed, as `collect` returns."""
    return [_summary(cell, runs) for cell, runs in grouped(records, cell_of).items()]


def _summary(cell: Cell, runs: Sequence[Record]) -> Summary:
    measured = [(_figures(run), attacks_of(run)) for run in runs]
    names = dict.fromkeys(name for figures, _ in measured for name in figures)
    plans = {name: {attacks for figures, attacks in measured if name in figures} for name in WORST if name in names}
    mixed = tuple(name for name, sets in plans.items() if len(sets) > 1)
    return Summary(
        cell, len(runs), tuple(run.seed for run in runs),
        {name: figure([figures[name] for figures, _ in measured if name in figures]) for name in names if name not in mixed},
        departures(runs[0]), any(run.evaluation.autoattack_unreliable for run in runs),
        {name: sets.pop() for name, sets in plans.items() if name not in mixed}, mixed, shared_settings(runs[0]),
        tuple(dict.fromkeys(run.trained_by_words for run in runs)), older_versions(runs[0]),
    )  # fmt: skip


def _figures(record: Record) -> dict[str, float]:
    values = {measure.name: measure.value(record) for measure in SUMMARY}
    return {name: float(value) for name, value in values.items() if value is not None}


def attacks_in_words(attacks: frozenset[str]) -> str:
    """'the preset standard without transfer', or the attacks' names if they do not form a preset."""
    few_classes = [(f"{name} for few classes", preset.for_classes(n)) for n in (2, 3) for name, preset in PRESETS.items()]
    for name, preset in [*PRESETS.items(), *few_classes]:
        if attacks in (set(preset.attacks), set(preset.attacks) - {"transfer"}):
            return f"the preset {name}" + (" without transfer" if attacks < set(preset.attacks) else "")
    if attacks == QUICK_OF_VERSION_0_1:
        return "the preset quick of version 0.1"
    return ", ".join(sorted(attacks)) or "attacks that are not in the Record"


def figure(values: Sequence[float]) -> Figure:
    """Mean and sample deviation of at least one value."""
    return Figure(fmean(values), stdev(values) if len(values) > 1 else None, len(values), tuple(values))


def worst_name(summaries: Iterable[Summary]) -> str:
    """The worst case to compare these by: the one that most of them have over several seeds. Ties are broken by how many have it
    at all, and then by the order of `WORST`."""
    seeds = [(name, figure.n) for summary in summaries for name, figure in summary.figures.items()]
    several, any_number = Counter(name for name, n in seeds if n > 1), Counter(name for name, _ in seeds)
    return max(WORST, key=lambda name: (several[name], any_number[name]))


def interval(summary: Summary, name: str) -> tuple[float, float]:
    """Interval of an accuracy, in percent: the smallest one that contains both the 95 % Wilson interval of the mean on the test
    images and the 95 % interval of the mean over seeds, mean ± t(n - 1, 0.975) * s / sqrt(n).

    With a single seed it is the Wilson interval alone, which says nothing about other seeds: do not rank networks by it.
    """
    accuracy = summary.figures[name]
    low, high = wilson(accuracy.mean / 100, summary.cell.test_images)
    margin = 0.0 if accuracy.std is None else student_t(accuracy.n - 1) * accuracy.std / math.sqrt(accuracy.n)
    return max(0.0, min(low, accuracy.mean - margin)), min(100.0, max(high, accuracy.mean + margin))


def outcome(summary: Summary, other: Summary, name: str) -> Outcome:
    """Whether `summary` is ahead of `other` in an accuracy: their intervals do not overlap, and both have several seeds."""
    if min(summary.figures[name].n, other.figures[name].n) < 2:
        return "one seed"
    (low, high), (other_low, other_high) = interval(summary, name), interval(other, name)
    return "ahead" if low > other_high else "behind" if high < other_low else "not apart"


def student_t(degrees: int) -> float:
    """The 0.975 quantile of Student's t distribution; above 30 degrees of freedom the value for 30, which is slightly too large."""
    return T_QUANTILES[min(degrees, len(T_QUANTILES)) - 1]


def by_setting(summaries: Iterable[Summary]) -> dict[Cell, list[Summary]]:
    """Summaries by setting (data set, network, training length, threat model), in order of first occurrence."""
    return grouped(summaries, lambda summary: summary.cell.setting)


def differing_settings(summary: Summary, others: Sequence[Summary], ignored: Collection[str] = ()) -> list[str]:
    """'training.lr 0.05': the settings, apart from those of methods and the `ignored` ones, in which one of the others differs."""
    return [
        f"{name} {short_value(value)}" for name, value in summary.shared.items()
        if name not in ignored and any(other.shared.get(name) != value for other in others)
    ]  # fmt: skip


def comparable_groups(summaries: Iterable[Summary]) -> list[list[Summary]]:
    """Groups of comparable summaries, with equal setting and equal `shared`, in order of first occurrence."""
    groups: list[list[Summary]] = []
    for summary in summaries:
        key = summary.cell.setting, summary.shared
        match = next((group for group in groups if (group[0].cell.setting, group[0].shared) == key), None)
        if match is None:
            groups.append(match := [])
        match.append(summary)
    return groups

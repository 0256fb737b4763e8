"""Whether choosing an expert helps: routed networks against their controls with one expert, on the same images."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from advmoe.evaluation.record import Record
from advmoe.evaluation.record_evaluation import Difference
from advmoe.reports.cell import Cell, cell_of, grouped, is_routed
from advmoe.reports.claims import CHOICE
from advmoe.reports.control import CONTROL, compared, worst_case_difference
from advmoe.reports.markup import Statement
from advmoe.reports.measures import worst_of
from advmoe.reports.styles import network_title, setting_text
from advmoe.reports.summaries import summarise
from advmoe.wording import number_of

MAX_LISTED = 6  # networks in a sentence
QUESTION = "Does choosing an expert help?"


def choice_answers(records: Iterable[Record]) -> list[Statement]:
    """One answer for each setting in which a routed network and its control were attacked alike on the same images."""
    groups = grouped(records, lambda record: cell_of(record).setting)
    answers = {setting: answer for setting, members in groups.items() if (answer := _answer(members))}
    settings = {setting: f" Setting: {setting_text(setting)}." if len(answers) > 1 else "" for setting in answers}
    on = {setting: f" On {setting.dataset}:" if len(groups) > 1 else "" for setting in answers}
    return [
        Statement(f"{QUESTION}{on[setting]} {answer}", figures + settings[setting])
        for setting, (answer, figures) in answers.items()
    ]


def _answer(records: Sequence[Record]) -> Statement | None:
    differences = differences_from_control(records)
    if not differences:
        return None
    (claim,) = CHOICE.judge(summarise(records), records)
    figures = " or ".join(dict.fromkeys(against.figure for against in differences.values()))
    texts = {
        cell: f"{network_title(cell)}: {against}" + (f" of {against.figure}" if " or " in figures else "")
        for cell, against in differences.items()
    }
    listed = "; ".join(texts.values()) if len(texts) <= MAX_LISTED else _extremes(texts, differences)
    unsure = "By the intervals over seeds and images, no network is clearly below its control, and not all are clearly above it."
    if all(against.seeds == 1 for against in differences.values()):
        unsure = "With one seed nothing follows for other seeds."
    return Statement(
        f"{claim.verdict.capitalize()}.",
        f"{figures} minus that of {CONTROL}, on the same images, with the 95 % interval over the images, not over "
        f"seeds: {listed}." + f" {unsure}" * (claim.verdict == "not shown"),
    )


def _extremes(texts: Mapping[Cell, str], differences: Mapping[Cell, "Against"]) -> str:
    """How many of the differences are clearly above and below 0, and the texts of the highest and the lowest."""
    intervals = [against.difference for against in differences.values()]
    above, below = sum(each.low > 0 for each in intervals), sum(each.high < 0 for each in intervals)
    by_value = sorted(differences, key=lambda cell: differences[cell].difference.value)
    return (
        f"of {len(intervals)} networks, the interval is above 0 for {above or 'none'} and below 0 for {below or 'none'}. The "
        f"highest of these differences is that of {texts[by_value[-1]]}. The lowest is that of {texts[by_value[0]]}"
    )


class Against(NamedTuple):
    """A network's difference in the worst case, `figure`, from its control, and the number of seeds that are compared."""

    difference: Difference
    seeds: int
    figure: str

    def __str__(self) -> str:
        """'+2.0 points (-1.3 to +5.2), 2 seeds'."""
        return f"{self.difference.words}, {number_of(self.seeds, 'seed')}"


def differences_from_control(records: Sequence[Record]) -> dict[Cell, Against]:
    """Each routed network's difference from its control.

    Networks whose control was trained with other settings are left out.
    """
    runs: dict[Cell, dict[int, Record]] = {}
    for record in records:
        runs.setdefault(cell_of(record), {})[record.seed] = record
    differences = {}
    for cell, seeds in runs.items():
        control = CHOICE.other_of(cell, runs) if is_routed(cell.method) else None
        if control is None or CHOICE.unequal_settings(cell, control, records):
            continue
        pairs = compared((record, runs[control][seed]) for seed, record in seeds.items() if seed in runs[control])
        if difference := worst_case_difference(pairs):
            differences[cell] = Against(difference, len(pairs), worst_of(pairs[0][0]).label)
    return differences

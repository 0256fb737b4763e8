"""Comparison of a network with its control: the same network and training with one expert."""

from collections.abc import Iterable

from advmoe.evaluation.record import Record
from advmoe.evaluation.record_evaluation import Difference
from advmoe.evaluation.results import paired
from advmoe.reports.attacks import points
from advmoe.reports.measures import attacks_of, worst_of

CONTROL = "the control with one expert"
NO_CONTROL = f"{CONTROL.capitalize()} was not run (recipe suffix -n1, or num_experts: 1 in a sweep file)."


def worst_case_difference(pairs: Iterable[tuple[Record, Record]]) -> Difference | None:
    """RA-worst of networks minus that of their controls, on the same images, in points, with its 95 % interval.

    Pairs that were evaluated on different images, or without flags of the robust images, are left out; None if no pair remains.
    """
    cells = [
        cell for record, control in pairs if _same_images(record, control)
        for cell in zip(record.evaluation.flags, control.evaluation.flags, strict=True)
    ]  # fmt: skip
    return paired(cells.count(("1", "0")), cells.count(("0", "1")), len(cells)) if cells else None


def _same_images(record: Record, control: Record) -> bool:
    flags, others = record.evaluation.flags, control.evaluation.flags
    return record.fingerprint == control.fingerprint and len(flags) == len(others) > 0


def comparison_line(record: Record, control: Record) -> str:
    """The difference in one line, or the reason why the two cannot be compared."""
    name = control.run or "the control"
    if (record.epsilon, record.norm) != (control.epsilon, control.norm):
        return f"not compared with {name}: its epsilon or norm differs"
    if attacks_of(record) != attacks_of(control):
        return f"not compared with {name}: it was attacked differently; evaluate both with the same preset"
    difference = worst_case_difference([(record, control)])
    if difference is None:
        return f"not compared with {name}: it was evaluated on other images, or a Record does not say which images are robust"
    verdict = "more robust" if difference.low > 0 else "less robust" if difference.high < 0 else "no significant difference"
    return f"{worst_of(record).label} minus that of {name}, on the same images: {points(difference)}: {verdict}"

"""Comparison of a network with its control: usually AT (MoE) with one expert, the same network without a choice."""

from collections.abc import Iterable

from advmoe.evaluation.record import Record
from advmoe.evaluation.record_evaluation import Difference
from advmoe.evaluation.results import mean_difference
from advmoe.reports.measures import attack_settings, attacks_of, evaluated, worst_of
from advmoe.reports.settings import differing

CONTROL = "the control with one expert"
NO_CONTROL = f"{CONTROL.capitalize()} was not run (recipe DATASET-BACKBONE-at_moe-n1; in a sweep file at_moe with num_experts: 1)."


def worst_case_difference(pairs: Iterable[tuple[Record, Record]]) -> Difference | None:
    """RA-worst of networks minus that of their controls, on the same images, in points, with its 95 % interval over the images.

    Pairs that cannot be compared are left out, and pairs on other images or under other attacks than the first one's; None if no
    pair remains.
    """
    same = compared(pairs)
    if not same:
        return None
    flags = [(record.evaluation.flags, control.evaluation.flags) for record, control in same]
    by_pair = [[(a == "1") - (b == "1") for a, b in zip(one, other, strict=True)] for one, other in flags]
    differences = [sum(of_image) for of_image in zip(*by_pair, strict=True)]
    return mean_difference(sum(differences), sum(value**2 for value in differences), len(differences), len(same))


def compared(pairs: Iterable[tuple[Record, Record]]) -> list[tuple[Record, Record]]:
    """The pairs that `worst_case_difference` compares."""
    comparable = [(record, control) for record, control in pairs if not obstacle(record, control)]
    return [(record, control) for record, control in comparable if not obstacle(record, comparable[0][0])]


def obstacle(record: Record, control: Record) -> str:
    """Why the worst cases of two Records cannot be compared image by image; empty if they can."""
    if (record.epsilon, record.norm) != (control.epsilon, control.norm):
        return "its epsilon or norm differs"
    one, other = record.evaluation, control.evaluation
    alike = attacks_of(record) == attacks_of(control)
    in_both = set(one.left_out) & set(other.left_out)
    if not alike and in_both and (one.attacks.keys(), one.partly_run) == (other.attacks.keys(), other.partly_run):
        return "attacks on the routing, which only one of the two networks has, were left out (they need Linf and a pathway budget)"
    if not alike or worst_of(record).name != worst_of(control).name:
        return "it was attacked differently; evaluate both with the same presets (--fresh forgets earlier ones)"
    if evaluated(record) != evaluated(control):
        return "it was attacked by another version of advmoe; evaluate both with the same one"
    if difference := _other_settings(record, control):
        how = "evaluate both with the same --precision, --pathway-budget and --transfer"
        return f"its attacks had other settings ({difference}); {how}"
    same_images = record.fingerprint == control.fingerprint and len(one.flags) == len(other.flags) > 0
    return "" if same_images else "it was evaluated on other images, or a Record does not say which images are robust"


def _other_settings(record: Record, control: Record) -> str:
    """The settings of their attacks in which the Records differ, as far as both say them; empty if there are none."""
    ours, theirs = _settings(record), _settings(control)
    return differing(
        {name: value for name, value in theirs.items() if name in ours},
        {name: value for name, value in ours.items() if name in theirs},
    )


def _settings(record: Record) -> dict[str, object]:
    runs = record.evaluation.attacks.items()
    return {
        **attack_settings(record),
        **{f"pathway budget of {name}": run.pathway_budget for name, run in runs if run.pathway_budget is not None},
        **{f"source network of {name}": run.transfer for name, run in runs if run.transfer is not None},
    }


def comparison_line(record: Record, control: Record) -> str:
    """The difference of the two trained networks in one line, or the reason why they cannot be compared."""
    name = control.run or "the control"
    difference = worst_case_difference([(record, control)])
    if difference is None:
        return f"not compared with {name}: {obstacle(record, control)}"
    verdict = "more robust than" if difference.low > 0 else "less robust than" if difference.high < 0 else "not apart from"
    return (
        f"{worst_of(record).label} minus that of {name}, on the same images: {difference.words}: this trained network is "
        f"{verdict} that one. The interval is over images, not seeds: it compares the two networks, not their methods"
    )

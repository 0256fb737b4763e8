"""Three answers from Records of one setting and seed: how robust AdvMoE is, at what cost, and whether choosing an expert helps."""

from collections.abc import Mapping, Sequence

from advmoe.evaluation.record import Record
from advmoe.reports.cell import cell_of
from advmoe.reports.choice import choice_answers
from advmoe.reports.markup import Statement


def answers(records: Sequence[Record]) -> list[Statement]:
    """One answer for each question that the Records can answer. At most one Record of each method, beside that of the control with
    one expert; without AdvMoE the list is empty."""
    by_method = {record.method: record for record in records if not cell_of(record).has_one_expert}
    routed = by_method.get("advmoe")
    if routed is None:
        return []
    return [_how_robust(routed, by_method.get("standard")), _at_what_cost(routed, by_method), *choice_answers(records)]


def _how_robust(routed: Record, plain: Record | None) -> Statement:
    low, high = routed.worst_interval
    others = "" if plain is None else f" A network without robust training: {plain.worst:.1f} %."
    bound = "" if routed.ra_worst is not None else " AutoAttack was not run, so this is an upper bound."
    return Statement(
        f"How robust? {routed.worst:.1f} % of the test images stay correct under every attack that was run.",
        f"AdvMoE on {routed.dataset}, seed {routed.seed}, 95 % interval {low:.0f} to {high:.0f}; {routed.sa:.1f} % of the clean "
        f"images are classified correctly.{others}{bound}",
    )


def _at_what_cost(routed: Record, by_method: Mapping[str, Record]) -> Statement:
    names = {"at_dense": "the dense network", "at_small_dense": "the small dense network of about the same cost"}
    others = [f"{name} {by_method[method].worst:.1f} %" for method, name in names.items() if method in by_method]
    share = 100 * routed.gmacs / routed.gmacs_dense
    return Statement(
        f"At what cost? {routed.gmacs:.4f} GMACs for an image, {share:.0f} % of the dense network's.",
        f"For comparison, the share that stays correct: {', '.join(others)}." if others else "",
    )

"""Three answers about AdvMoE from Records of one setting and seed: how robust it is, at what cost, and whether routing helps."""

from collections.abc import Iterable

from advmoe.evaluation.record import Record
from advmoe.reports.cell import cell_of
from advmoe.reports.choice import QUESTION
from advmoe.reports.control import CONTROL, NO_CONTROL, obstacle, worst_case_difference
from advmoe.reports.markup import Statement


def answers(records: Iterable[Record]) -> list[Statement]:
    """One answer for each question that the Records can answer. At most one Record for each label of a `Cell`; without AdvMoE the
    list is empty.

    The control of AdvMoE is AT (MoE) with one expert: without a choice, AdvMoE's routers have nothing to learn.
    """
    by_label = {cell_of(record).label: record for record in records}
    routed = by_label.get("advmoe")
    if routed is None:
        return []
    labels = ("standard", "at_dense", "at_small_dense", "at_moe, one expert")
    plain, dense, small, control = (by_label.get(label) for label in labels)
    return [_how_robust(routed, plain), _at_what_cost(routed, dense), *_does_routing_help(routed, control, small)]


def _how_robust(routed: Record, plain: Record | None) -> Statement:
    low, high = routed.worst_interval
    others = "" if plain is None else f" A network without robust training: {plain.worst:.1f} %."
    bound = "" if routed.ra_worst is not None else " AutoAttack was not run, so this is an upper bound."
    return Statement(
        f"How robust? {routed.worst:.1f} % of the test images stay correct under every attack that was run.",
        f"AdvMoE on {routed.dataset}, seed {routed.seed}, 95 % interval {low:.0f} to {high:.0f}; {routed.sa:.1f} % of the clean "
        f"images are classified correctly.{others}{bound}",
    )


def _at_what_cost(routed: Record, dense: Record | None) -> Statement:
    others = "" if dense is None else f"With the dense network {dense.worst:.1f} % stay correct under every attack that was run."
    share = 100 * routed.gmacs / routed.gmacs_dense
    return Statement(f"At what cost? {routed.gmacs:.4f} GMACs for an image, {share:.0f} % of the dense network's.", others)


def _does_routing_help(routed: Record, control: Record | None, small: Record | None) -> list[Statement]:
    routing, parts = routed.evaluation.routing, []
    if small is not None and (difference := worst_case_difference([(routed, small)])):
        parts.append(f"Over the small dense network of about the same cost: {difference.words}.")
    if routing is not None and routing.fixed_expert_sa and routing.fixed_expert_ra and "10" in routed.ra:
        ra, sa = max(zip(routing.fixed_expert_ra, routing.fixed_expert_sa, strict=True))
        with_routers = f"With routers it is {routed.ra['10']:.1f} %; PGD-10 gives routed networks too high a figure."
        under = f"{ra:.1f} % under PGD-10. {with_routers}"
        if routing.choice_gain_worst:
            ra, sa = max(zip(routing.fixed_expert_ra_worst, routing.fixed_expert_sa, strict=True))
            under = f"{ra:.1f} % in the worst case (with routers {routed.worst:.1f} %)."
        parts.append(
            f"With the most robust expert in every layer, {sa:.1f} % of the clean images are classified correctly "
            f"(with routers {routed.sa:.1f} %), and {under}"
        )
    difference = worst_case_difference([(routed, control)]) if control else None
    if difference is not None:
        answer = "Yes, in this seed." if difference.low > 0 else "Not shown."
        answer = "No, it harms in this seed." if difference.high < 0 else answer
        parts.insert(0, f"The share of images that withstand every attack changes by {difference.words} against {CONTROL}.")
    else:
        answer = f"Not compared with {CONTROL}: {obstacle(routed, control)}." if control else NO_CONTROL
    return [Statement(f"{QUESTION} {answer}", " ".join(parts))] if parts or control else []

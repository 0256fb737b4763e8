"""Three answers about AdvMoE from Records of one setting and seed: how robust it is, at what cost, and whether routing helps."""

from collections.abc import Iterable
from math import sqrt

from advmoe.evaluation.record import Record

Z_95 = 1.96  # the half-width of a 95 % interval, in standard errors


def answers(records: Iterable[Record]) -> list[str]:
    """One answer for each question that the Records can answer. At most one Record a method; without AdvMoE the list is empty."""
    by_method = {record.method: record for record in records}
    routed = by_method.get("advmoe")
    if routed is None:
        return []
    plain, dense, small = (by_method.get(method) for method in ("standard", "at_dense", "at_small_dense"))
    return [_how_robust(routed, plain), _at_what_cost(routed, dense), *_does_routing_help(routed, small)]


def _how_robust(routed: Record, plain: Record | None) -> str:
    low, high = routed.evaluation.intervals.get("ra_worst", routed.evaluation.intervals.get("ra_worst_quick", (0.0, 100.0)))
    others = "" if plain is None else f" A network without robust training: {plain.worst:.1f} %."
    bound = "" if routed.ra_worst is not None else " AutoAttack was not run, so this is an upper bound."
    return (
        f"How robust? AdvMoE classifies {routed.sa:.1f} % of the clean test images correctly; {routed.worst:.1f} % stay correct "
        f"under every attack that was run (95 % interval {low:.0f} to {high:.0f}).{others}{bound}"
    )


def _at_what_cost(routed: Record, dense: Record | None) -> str:
    others = "" if dense is None else f" With the dense network {dense.worst:.1f} % stay correct under every attack that was run."
    share = 100 * routed.gmacs / routed.gmacs_dense
    return f"At what cost? {routed.gmacs:.4f} GMACs for an image, {share:.0f} % of the dense network's.{others}"


def _does_routing_help(routed: Record, small: Record | None) -> list[str]:
    routing, parts = routed.evaluation.routing, []
    if small is not None and len(small.evaluation.flags) == len(routed.evaluation.flags) > 0:
        parts.append(_against_the_small_network(routed, small))
    if routing is not None and routing.fixed_expert_sa and routing.fixed_expert_ra and "10" in routed.ra:
        sa, ra = max(routing.fixed_expert_sa), max(routing.fixed_expert_ra)
        parts.append(
            f"With the best single expert in every layer, {sa:.1f} % of the clean images are classified correctly "
            f"(with routers {routed.sa:.1f} %), and {ra:.1f} % under PGD-10 (with routers {routed.ra['10']:.1f} %)."
        )
    no_control = "This needs a control, the same network trained with one expert (recipe suffix -n1), and none was run."
    return [" ".join(("Does choosing an expert help?", no_control, *parts))] if parts else []


def _against_the_small_network(routed: Record, small: Record) -> str:
    """Compare image by image: both networks were attacked on the same images."""
    difference, margin = paired_difference(routed.evaluation.flags, small.evaluation.flags)
    verdict = "no significant difference" if abs(difference) <= margin else "more robust" if difference > 0 else "less robust"
    return (
        f"The small dense network of about the same cost classifies {small.worst:.1f} % correctly under attack. AdvMoE differs by "
        f"{difference:+.1f} points, with a 95 % margin of {margin:.1f} points ({verdict})."
    )


def paired_difference(flags: str, others: str) -> tuple[float, float]:
    """Accuracy of the first network minus that of the second on the same images, in points, and the half-width of its 95 %
    interval (McNemar's standard error). Flags have one digit for each image, 1 if it is robust."""
    n = len(flags)
    gained = sum(a == "1" and b == "0" for a, b in zip(flags, others, strict=True))
    lost = sum(a == "0" and b == "1" for a, b in zip(flags, others, strict=True))
    error = sqrt(max(gained + lost - (gained - lost) ** 2 / n, 0.0)) / n
    return 100 * (gained - lost) / n, 100 * Z_95 * error

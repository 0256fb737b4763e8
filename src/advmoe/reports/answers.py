"""Three answers about AdvMoE from Records of one setting and seed: how robust, at what cost, is the choice of expert worth it."""

from collections.abc import Iterable
from math import sqrt

from advmoe.evaluation.record import Record

CHANCE = 1.96  # standard errors of a difference that chance alone exceeds in 5 % of the cases


def answers(records: Iterable[Record]) -> list[str]:
    """A sentence for each question that the Records can answer, one Record for each method; none without AdvMoE."""
    by_method = {record.method: record for record in records}
    routed = by_method.get("advmoe")
    if routed is None:
        return []
    plain, dense, small = (by_method.get(method) for method in ("standard", "at_dense", "at_small_dense"))
    return [_how_robust(routed, plain), _at_what_cost(routed, dense), *_is_the_choice_worth_it(routed, small)]


def _how_robust(routed: Record, plain: Record | None) -> str:
    low, high = routed.evaluation.intervals.get("ra_worst", routed.evaluation.intervals.get("ra_worst_quick", (0.0, 100.0)))
    others = "" if plain is None else f" Without robust training it is {plain.worst:.1f} %."
    bound = "" if routed.ra_worst is not None else " AutoAttack was not run, so this is an upper bound."
    return (
        f"How robust? AdvMoE is right on {routed.sa:.1f} % of the clean test images, and stays right on {routed.worst:.1f} % under "
        f"every attack that was run (95 % interval {low:.0f} to {high:.0f}).{others}{bound}"
    )


def _at_what_cost(routed: Record, dense: Record | None) -> str:
    others = "" if dense is None else f" The dense network stays right on {dense.worst:.1f} % under every attack that was run."
    share = 100 * routed.gmacs / routed.gmacs_dense
    return f"At what cost? {routed.gmacs:.4f} GMACs for an image, {share:.0f} % of the dense network's.{others}"


def _is_the_choice_worth_it(routed: Record, small: Record | None) -> list[str]:
    routing, parts = routed.evaluation.routing, []
    if small is not None and len(small.evaluation.flags) == len(routed.evaluation.flags) > 0:
        parts.append(_against_the_small_network(routed, small))
    if routing is not None and routing.fixed_expert_sa and routing.fixed_expert_ra and "10" in routed.ra:
        sa, ra = max(routing.fixed_expert_sa), max(routing.fixed_expert_ra)
        parts.append(
            f"With the best single expert in every layer, {sa:.1f} % of the clean images are right "
            f"(with routers {routed.sa:.1f} %), and {ra:.1f} % under PGD-10 (with routers {routed.ra['10']:.1f} %)."
        )
    unsettled = "Only a control can tell, the same network trained with one expert (recipe suffix -n1), and none was run."
    return [" ".join(("Is the choice of expert worth anything?", unsettled, *parts))] if parts else []


def _against_the_small_network(routed: Record, small: Record) -> str:
    """Compares image by image: the two networks were attacked on the same ones."""
    difference, chance = paired_difference(routed.evaluation.flags, small.evaluation.flags)
    verdict = "no difference is shown" if abs(difference) <= chance else "more robust" if difference > 0 else "less robust"
    return (
        f"The small dense network of about the same cost stays right on {small.worst:.1f} %: AdvMoE is {difference:+.1f} points "
        f"from it, where chance explains {chance:.1f} ({verdict})."
    )


def paired_difference(flags: str, others: str) -> tuple[float, float]:
    """Difference of two shares of the same images, in points, and its 95 % half-width (McNemar's standard error)."""
    n = len(flags)
    gained = sum(a == "1" and b == "0" for a, b in zip(flags, others, strict=True))
    lost = sum(a == "0" and b == "1" for a, b in zip(flags, others, strict=True))
    error = sqrt(max(gained + lost - (gained - lost) ** 2 / n, 0.0)) / n
    return 100 * (gained - lost) / n, 100 * CHANCE * error

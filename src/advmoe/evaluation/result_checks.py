"""The self-checks of an evaluation that only read the results of its attacks.

They are four of the thirteen checks; `advmoe.evaluation.checks` has the others.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from advmoe.attacks.autoattack import STANDARD, SUBSTITUTES
from advmoe.evaluation.record_evaluation import Check, RoutingFigures, Status
from advmoe.evaluation.results import Evaluation
from advmoe.evaluation.store import Shard
from advmoe.wording import number_of

POINTS = 0.5  # percentage points that RA-AA may be above RA-worst
NO_ATTACK = "epsilon is 0, so there is no attack to check"
AUTOATTACK = {  # figure -> its label
    "ra_aa": "RA-AA", "ra_aa_few_classes": "RA-AA (few classes)",
    "ra_aa_plus": "RA-AA-plus", "ra_aa_plus_few_classes": "RA-AA-plus (few classes)",
}  # fmt: skip
COLLAPSE = 0.95  # share of a layer's images above which one expert has nearly all


def threshold(points: float, images: int) -> float:
    """`points` percentage points, or one of the `images` if that is more, with a little room for rounding."""
    return max(points, 100 / images) + 1e-9


def check_results(shards: Sequence[Shard], evaluation: Evaluation, epsilon: float) -> list[Check]:
    """The checks of the results of all attacks on all shards. At epsilon 0 the comparisons of attacks are skipped."""
    total = sum(len(shard.rows) for shard in shards)
    comparisons = [square(shards, evaluation.figures), autoattack_reliable(evaluation.figures, evaluation.worst, total)]
    if epsilon == 0:
        comparisons = [replace(check, status="skipped", detail=NO_ATTACK) for check in comparisons]
    return [*comparisons, routing_alive(evaluation.routing), images_valid(shards)]


def square(shards: Sequence[Shard], figures: Mapping[str, float]) -> Check:
    """(4) Square, which uses no gradients, breaks hardly any image that AutoAttack's other attacks did not break.

    AutoAttack plus runs Square before its targeted attacks, so what it breaks there says nothing.
    """
    if not {"ra_aa", "ra_aa_few_classes"} & set(figures):
        return Check(4, "Square adds nothing", "skipped", "standard AutoAttack was not run")
    few_classes = [SUBSTITUTES["aa_apgd-t"]] if "ra_aa_few_classes" in figures else []
    others = {*STANDARD, *few_classes} - {"aa_square"}
    total, added = sum(len(shard.rows) for shard in shards), 0
    for shard in shards:
        added += len(shard.broken(["aa_square"]) - shard.broken(sorted(others & shard.attacks.keys())))
    share = 100 * added / total
    status: Status = "warn" if share > threshold(0.2, total) else "pass"
    return Check(4, "Square adds nothing", status, f"Square broke {share:.2f} points that gradient attacks did not")


def autoattack_reliable(figures: Mapping[str, float], worst: float, total: int) -> Check:
    """(5) RA-AA is at most half a percentage point above RA-worst. If it is more, RA-AA is marked as unreliable."""
    figure = next((name for name in AUTOATTACK if name in figures), None)
    if figure is None:
        return Check(5, "RA-AA near RA-worst", "skipped", "AutoAttack was not run")
    gap = figures[figure] - worst
    status: Status = "fail" if gap > threshold(POINTS, total) else "pass"
    return Check(5, "RA-AA near RA-worst", status, f"{AUTOATTACK[figure]} is {gap:.2f} points above RA-worst")


def routing_alive(routing: RoutingFigures | None) -> Check:
    """(6) Expert load on clean and adversarial images, and route changes. Warns if one expert gets more than
    95 % of a layer's images."""
    if routing is None:
        return Check(6, "experts are used", "skipped", "no routing, or PGD-50 was not run")
    layers = zip(routing.load, routing.load_adv, strict=True)
    shares = [max(max(load) / max(sum(load), 1) for load in both) for both in layers if len(both[0]) > 1]
    collapsed = sum(share > COLLAPSE for share in shares)
    layers_send = f"{collapsed} of {number_of(len(shares), 'layer')} send{'s' * (collapsed == 1)}"
    detail = f"{layers_send} over {100 * COLLAPSE:.0f} % of the images to one expert; busiest expert {max(shares, default=0):.0%}; "
    detail += f"the routes of {routing.flip_rate:.1f} % of the correctly classified images change"
    return Check(6, "experts are used", "warn" if collapsed else "pass", detail)


def images_valid(shards: Sequence[Shard]) -> Check:
    """(11) All adversarial images are finite, in [0, 1], and in the ball, up to rounding."""
    outside: Counter[str] = Counter()
    for shard in shards:
        outside.update({name: run.outside for name, run in shard.attacks.items() if run.outside})
    detail = ", ".join(f"{name}: {count} outside" for name, count in outside.items()) or "all inside"
    return Check(11, "adversarial images are valid", "fail" if outside else "pass", detail)

"""The attacks of one evaluation together: images that a single attack broke, bounds of the robust accuracy, gain by routing."""

from collections import Counter

from advmoe.evaluation.record import Record
from advmoe.evaluation.record_evaluation import EvaluationResult
from advmoe.reports.measures import label, worst_of


def attack_title(name: str) -> str:
    """'PGD-50' for pgd_50."""
    return name.upper().replace("_", "-")


def caught_alone(evaluation: EvaluationResult) -> dict[str, int]:
    """Attack -> number of images that it broke and no other attack did.

    An attack runs only on images that the earlier attacks of its chain did not break.
    """
    times = Counter(row for rows in evaluation.broken.values() for row in rows)
    return {name: sum(times[row] == 1 for row in rows) for name, rows in evaluation.broken.items()}


def routing_bounds(record: Record) -> str:
    """RA-paths and the worst case: an estimated lower bound and an upper bound of the accuracy under any attack on the routing.

    "" without RA-paths.
    """
    lower = record.evaluation.figures.get("ra_paths")
    if lower is None:
        return ""
    return f"between {lower:.1f} % ({label('ra_paths')}) and {record.worst:.1f} % ({worst_of(record).label})"


def choice_gains(evaluation: EvaluationResult) -> str:
    """The worst case of the routed network minus that of each fixed expert, as text; "" if it was not measured.

    Without it, as in older Records, the difference in RA-10, with the reason why that is probably too high.
    """
    routing = evaluation.routing
    gains = (routing.choice_gain_worst or routing.choice_gain) if routing else []
    text = "; ".join(f"{difference.words} over expert {expert} alone" for expert, difference in enumerate(gains))
    if not text or (routing and routing.choice_gain_worst):
        return text and f"{text}, in the worst case"
    return f"{text}, under PGD-10: probably too high, because PGD overestimates routed networks more than a fixed expert"

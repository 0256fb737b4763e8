"""What an evaluation says of the routing, as text: bounds of the accuracy under attack, gain by choosing an expert."""

from advmoe.evaluation.record import Record
from advmoe.evaluation.record_evaluation import EvaluationResult
from advmoe.reports.measures import label, worst_of


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

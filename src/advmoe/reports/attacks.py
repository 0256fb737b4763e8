"""What an evaluation's attacks say together: what each one adds, and between which figures the truth lies."""

from collections import Counter

from advmoe.evaluation.record_evaluation import Difference, EvaluationResult
from advmoe.reports.measures import label


def caught_alone(evaluation: EvaluationResult) -> dict[str, int]:
    """Attack -> number of images that it broke and no other attack did. Attacks run on what earlier ones of their chain left."""
    times = Counter(row for rows in evaluation.broken.values() for row in rows)
    return {name: sum(times[row] == 1 for row in rows) for name, rows in evaluation.broken.items()}


def bracket(evaluation: EvaluationResult) -> str:
    """RA-paths and the worst case as the two ends of what an attack on the routing can leave; "" without RA-paths."""
    figures = evaluation.figures
    worst = next((name for name in ("ra_worst", "ra_worst_quick") if name in figures), None)
    if worst is None or "ra_paths" not in figures:
        return ""
    return f"between {figures['ra_paths']:.1f} % ({label('ra_paths')}) and {figures[worst]:.1f} % ({label(worst)})"


def points(difference: Difference) -> str:
    """'+2.0 points (-1.3 to +5.2)'."""
    return f"{difference.value:+.1f} points ({difference.low:+.1f} to {difference.high:+.1f})"


def gains(evaluation: EvaluationResult) -> str:
    """RA-10 of the routed network less that of each fixed expert, in words; "" where it was not measured."""
    gain = evaluation.routing.choice_gain if evaluation.routing else []
    return "; ".join(f"{points(difference)} over expert {expert} alone" for expert, difference in enumerate(gain))

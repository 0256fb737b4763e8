"""Evaluation of a network: its accuracy under attack, and its cost."""

from typing import TYPE_CHECKING

from advmoe.moved import getter

if TYPE_CHECKING:
    from advmoe.attacks.presets import PRESETS
    from advmoe.attacks.registry import ATTACKS
    from advmoe.evaluation.checks import attack_strength
    from advmoe.evaluation.record_evaluation import Check
    from advmoe.evaluation.results import Evaluation
    from advmoe.evaluation.runner import evaluate
    from advmoe.evaluation.target import EvaluationOptions

__all__ = ["ATTACKS", "PRESETS", "Check", "Evaluation", "EvaluationOptions", "attack_strength", "evaluate"]
MODULES = {  # the modules of these names, which are imported when they are first used: Records are read without torch
    "ATTACKS": "advmoe.attacks.registry",
    "PRESETS": "advmoe.attacks.presets",
    "Check": "advmoe.evaluation.record_evaluation",
    "Evaluation": "advmoe.evaluation.results",
    "EvaluationOptions": "advmoe.evaluation.target",
    "attack_strength": "advmoe.evaluation.checks",
    "evaluate": "advmoe.evaluation.runner",
}

if not TYPE_CHECKING:
    __getattr__ = getter(__name__, MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Evaluation of a network: its accuracy under attack, and its cost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
MODULES = {
    "ATTACKS": "advmoe.attacks.registry",
    "PRESETS": "advmoe.attacks.presets",
    "Check": "advmoe.evaluation.record_evaluation",
    "Evaluation": "advmoe.evaluation.results",
    "EvaluationOptions": "advmoe.evaluation.target",
    "attack_strength": "advmoe.evaluation.checks",
    "evaluate": "advmoe.evaluation.runner",
}


def __getattr__(name: str) -> Any:
    """Import the names in `__all__` when they are first used, so that Records can be read without torch."""
    if name in MODULES:
        return getattr(import_module(MODULES[name]), name)
    return getter(__name__)(name)

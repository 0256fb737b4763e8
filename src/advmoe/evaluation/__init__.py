"""What a network withstands, and what it costs."""

from advmoe.attacks.presets import PRESETS
from advmoe.attacks.registry import ATTACKS
from advmoe.evaluation.checks import attack_strength
from advmoe.evaluation.record_evaluation import Check
from advmoe.evaluation.results import Evaluation
from advmoe.evaluation.runner import evaluate, evaluate_with
from advmoe.evaluation.target import EvaluationOptions

__all__ = ["ATTACKS", "PRESETS", "Check", "Evaluation", "EvaluationOptions", "attack_strength", "evaluate", "evaluate_with"]

"""What a network withstands, and what it costs."""

from advmoe.evaluation.checks import Check, attack_strength
from advmoe.evaluation.evaluate import Evaluation, evaluate
from advmoe.evaluation.suite import ATTACKS, PRESETS

__all__ = ["ATTACKS", "PRESETS", "Check", "Evaluation", "attack_strength", "evaluate"]

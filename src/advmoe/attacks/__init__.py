"""Attacks: functions from a network and correctly or wrongly classified pictures to adversarial ones."""

from advmoe.attacks.draws import BatchDraws, Draws, PictureDraws, derive_seed
from advmoe.attacks.objectives import OBJECTIVES, Objective, cross_entropy, kl_divergence
from advmoe.attacks.pgd import Pgd, frozen, pgd, project

__all__ = [
    "OBJECTIVES", "BatchDraws", "Draws", "Objective", "Pgd", "PictureDraws", "cross_entropy", "derive_seed", "frozen",
    "kl_divergence", "pgd", "project",
]  # fmt: skip

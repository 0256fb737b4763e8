"""Attacks: functions that take a network and images, and return adversarial images."""

from typing import TYPE_CHECKING

from advmoe.attacks.apgd import Apgd, NetworkPair, apgd, targeted_apgd
from advmoe.attacks.draws import BatchDraws, Draws, ImageDraws, derive_seed
from advmoe.attacks.geometry import project
from advmoe.attacks.objectives import (
    Objective,
    cross_entropy,
    dlr,
    full,
    kl_divergence,
    margin,
    targeted_dlr,
)
from advmoe.attacks.pgd import Pgd, evaluation_pgd, frozen, pgd
from advmoe.config.choices import Norm
from advmoe.moved import getter

__all__ = [
    "Apgd",
    "BatchDraws",
    "Draws",
    "ImageDraws",
    "NetworkPair",
    "Norm",
    "Objective",
    "Pgd",
    "apgd",
    "cross_entropy",
    "derive_seed",
    "dlr",
    "evaluation_pgd",
    "frozen",
    "full",
    "kl_divergence",
    "margin",
    "pgd",
    "project",
    "targeted_apgd",
    "targeted_dlr",
]  # fmt: skip

if not TYPE_CHECKING:
    __getattr__ = getter(__name__)

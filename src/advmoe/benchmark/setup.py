"""Where, how large and how often a suite measures."""

from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Scale:
    """How large and how often things are measured. The targets are stated for the defaults."""

    width: int | None = None
    """Channels of every network's first stage; by default the published ones."""
    side: int = 32
    """Height and width of the images."""
    batch: int = 64
    """Images of an inference batch."""
    training_batch: int = 128
    """Images of a training batch."""
    attack_batch: int = 32
    """Images attacked at once."""
    attack_steps: int = 50
    """Steps of the evaluation attack."""
    images: int = 50_000
    """Training images that batches are loaded from."""
    rounds: int | None = None
    """Rounds of every comparison; by default what each needs for a steady median."""


QUICK = Scale(width=20, side=8, batch=4, training_batch=6, attack_batch=2, attack_steps=2, images=60, rounds=1)


@dataclass(frozen=True)
class Setup:
    """What a suite is given."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    scale: Scale = field(default_factory=Scale)
    quick: bool = False
    """Tiny networks and few repetitions: shows that a suite runs; its numbers mean nothing."""
    runs: tuple[Path, ...] = ()
    """Folders of trained runs, for the suites that need some."""

    def rounds(self, usual: int) -> int:
        """Rounds of a comparison that usually takes `usual`."""
        return self.scale.rounds or usual

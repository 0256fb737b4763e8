"""The setup of a measurement: device, sizes and number of repetitions."""

from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Scale:
    """Sizes and numbers of repetitions. The targets are for the default values."""

    width: int | None = None
    """Channels of the first stage of every network; by default the published width."""
    side: int = 32
    """Height and width of the images."""
    batch: int = 64
    """Number of images in an inference batch."""
    training_batch: int = 128
    """Number of images in a training batch."""
    attack_batch: int = 32
    """Number of images attacked at once."""
    attack_steps: int = 50
    """Steps of the evaluation attack."""
    images: int = 50_000
    """Number of training images that batches are loaded from."""
    rounds: int | None = None
    """Rounds of every comparison; by default the number that each needs for a stable median."""
    warm_up: int = 10
    """Rounds of training before the measured ones. At first AdvMoE compiles kernels for the sizes of its groups, once in a run."""


QUICK = Scale(width=20, side=8, batch=4, training_batch=6, attack_batch=2, attack_steps=2, images=60, rounds=1, warm_up=1)


@dataclass(frozen=True)
class Setup:
    """The arguments of a suite."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    scale: Scale = field(default_factory=Scale)
    quick: bool = False
    """Tiny networks and few repetitions. This shows that a suite runs; its numbers mean nothing."""
    runs: tuple[Path, ...] = ()
    """Folders of trained runs, for the suites that need some."""

    def rounds(self, usual: int) -> int:
        """The number of rounds of a comparison whose default is `usual`."""
        return self.scale.rounds or usual

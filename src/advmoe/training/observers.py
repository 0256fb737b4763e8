"""What follows a training run from outside: progress displays, trackers, tests."""

from advmoe.training.manifest import EpochRow
from advmoe.training.steps import Metrics


class Observer:
    """Base of what follows a run. `train` calls it on rank 0 only; each method does nothing until a subclass says otherwise."""

    def iteration(self, epoch: int, done: int, total: int, sums: Metrics, images: int) -> None:
        """After every iteration: `done` of `total` in this epoch (from 1), with the epoch's sums over `images` images so far."""

    def epoch(self, row: EpochRow) -> None:
        """After every epoch, with its line of metrics.jsonl. The epoch's checkpoint is on disk."""

"""Observers of a training run, such as progress displays and trackers."""

from advmoe.training.manifest import EpochRow
from advmoe.training.steps import Metrics


class Observer:
    """Base class of observers. `train` calls them on rank 0 only. By default the methods do nothing."""

    def begin(self) -> None:
        """Before the first iteration of this process. The run's folder is claimed."""

    def iteration(self, epoch: int, done: int, total: int, sums: Metrics, images: int) -> None:
        """After every iteration: `done` of `total` in this epoch (from 1), with the epoch's sums over `images` images so far."""

    def epoch(self, row: EpochRow) -> None:
        """After every epoch, with its line of metrics.jsonl. The epoch's checkpoint is on disk."""

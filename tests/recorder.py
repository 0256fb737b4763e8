"""An observer of training runs for the tests."""

from collections.abc import Callable
from typing import Any

from advmoe.training.observers import Observer


class Recorder(Observer):
    """Records the rows of the epochs, and can stop a run at a chosen iteration. The fixture `recorder` adds warnings to `notes`."""

    def __init__(self, stop: Callable[[int, int], bool] = lambda epoch, iteration: False) -> None:
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.stop = stop

    def iteration(self, epoch: int, done: int, total: int, sums: Any, images: int) -> None:
        if self.stop(epoch, done):
            raise KeyboardInterrupt

    def epoch(self, row: Any) -> None:
        self.rows.append(dict(row))

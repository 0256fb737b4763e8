"""Who listens to a training run in the tests."""

from collections.abc import Callable
from typing import Any


class Recorder:
    """A training Listener that keeps what it is told, and may stop a run at a chosen iteration."""

    def __init__(self, stop: Callable[[int, int], bool] = lambda epoch, iteration: False) -> None:
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.stop = stop

    def iteration(self, epoch: int, done: int, total: int, sums: Any, images: int) -> None:
        if self.stop(epoch, done):
            raise KeyboardInterrupt

    def epoch(self, row: Any) -> None:
        self.rows.append(dict(row))

    def note(self, text: str) -> None:
        self.notes.append(text)

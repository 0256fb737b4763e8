"""What a test of figures looks at."""

from typing import Any

import pytest
from matplotlib.figure import Figure


def keep_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """A list that every matplotlib figure saved from now on is appended to."""
    kept: list[Figure] = []
    real = Figure.savefig

    def savefig(self: Figure, *words: Any, **more: Any) -> None:
        kept.append(self)
        real(self, *words, **more)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return kept

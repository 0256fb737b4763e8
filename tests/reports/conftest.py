"""The matplotlib figures that a test saves."""

from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """A list to which each figure is appended when it is saved."""
    figures: list[Figure] = []
    savefig = Figure.savefig

    def record_and_save(self: Figure, *arguments: Any, **fields: Any) -> None:
        figures.append(self)
        savefig(self, *arguments, **fields)

    monkeypatch.setattr(Figure, "savefig", record_and_save)
    return figures

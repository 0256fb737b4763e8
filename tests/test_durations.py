"""Times as short text."""

import pytest

from advmoe.durations import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "100 min"), (6000, "1.7 h"), (172_799, "48.0 h"), (200_000, "2.3 d")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text

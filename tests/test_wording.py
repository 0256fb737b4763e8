"""Times and counts as text."""

import pytest

from advmoe.wording import duration, number_of


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "100 min"), (6000, "1.7 h"), (172_799, "48.0 h"), (200_000, "2.3 d")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_only_one_is_singular():
    assert [number_of(number, "run") for number in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]

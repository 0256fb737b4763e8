"""What a sweep shows: a table that lives, or lines."""

import io

import pytest
from rich.console import Console

from advmoe.sweep.placement import Local
from advmoe.sweep.plan import grid, plan
from advmoe.sweep.show import Board, counts, duration, plan_table, remaining
from advmoe.sweep.states import State

TRAINING, DONE = State("training", 1, 3), State("done", 3, 3)


def console(terminal, height=30):
    return Console(file=io.StringIO(), force_terminal=terminal, width=160, height=height, color_system=None)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (7.4, "7 s"), (99, "99 s"), (100, "2 min"), (5999, "100 min"), (6000, "1.7 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_plan_shows_cost_state_and_time_of_each_run():
    runs = plan(grid("figA2"), ["s0"])
    states = {run.name: State("planned") for run in runs} | {
        runs[0].name: DONE,
        runs[1].name: State("failed", 1, 3, "no [space] left"),
    }
    screen = console(False)
    screen.print(plan_table(runs, states, {run.name: 600 for run in runs}))
    rows = {line.split()[1]: line for line in screen.file.getvalue().splitlines() if "cifar10" in line}
    assert len(rows) == 5
    assert "0.5554" in rows["cifar10-resnet18-at_dense-s0"]
    assert "min" not in rows["cifar10-resnet18-at_dense-s0"]
    assert "failed: no [space] left" in rows["cifar10-resnet18-at_small_dense-s0"]
    assert "10 min" in rows["cifar10-resnet18-advmoe-s0"]


def test_time_that_remains_is_shared_but_no_shorter_than_the_longest_run():
    place = Local(2, 1, ["cpu"])
    assert remaining(5, 0, {}, None, "") == "5 runs, 5 done"
    assert "the other 3 take up to about 15 s (2 workers of 1 threads on cpu)" in remaining(
        5, 3, {"a": 10, "b": 10, "c": 10}, place, ""
    )
    assert "about 50 s" in remaining(5, 3, {"a": 50, "b": 10, "c": 10}, place, "")
    assert "about 30 s (one after another)" in remaining(5, 3, {"a": 10, "b": 10, "c": 10}, None, "")
    assert remaining(5, 3, {}, None, "no data").endswith("the other 3 take is not known: no data")


def test_counts():
    assert counts({"a": TRAINING, "b": DONE, "c": DONE, "d": State("planned")}) == "2 done, 1 planned, 1 training"


def test_off_a_terminal_a_line_for_every_change(tmp_path):
    states, screen = {"a": State("planned"), "b": State("planned")}, console(False)
    with Board(screen, tmp_path, lambda: dict(states)) as board:
        board.look()
        states["b"] = TRAINING
        board.look()
        board.look()
        states["b"] = State("failed", 1, 3, "no [space] left")
        board.look()
    assert screen.file.getvalue() == "b: training epoch 2 of 3\nb: failed: no [space] left\n"


def test_on_a_terminal_a_table_that_fits_it_with_what_goes_on_first(tmp_path):
    states = {f"run-{number}": State("planned") for number in range(40)} | {"late": TRAINING}
    screen = console(True, height=12)
    with Board(screen, tmp_path, lambda: states) as board:
        board.look()
    shown = screen.file.getvalue()
    assert "40 planned, 1 training" in shown
    assert "late" in shown
    assert "training epoch 2 of 3" in shown
    assert "run-39" not in shown

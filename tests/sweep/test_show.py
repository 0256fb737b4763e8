"""How a sweep shows its progress: a live table on a terminal, otherwise lines."""

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from advmoe.runs.run_files import EpochSummary
from advmoe.runs.status import RunStatus, State
from advmoe.sweep.grid import read_sweep
from advmoe.sweep.placements import Request, local
from advmoe.sweep.placements.local import LocalPlacement
from advmoe.sweep.plan import plan
from advmoe.sweep.show import Board, counts, plan_table, remaining


def status(state, epoch=0, reason=""):
    rows = (EpochSummary(epoch, None, None, None, None, 1.0, 1.0, ()),) if epoch else ()
    return RunStatus(Path("run"), state, epochs=3, rows=rows, reason=reason, is_evaluated=state is State.DONE)


PLANNED, TRAINING, DONE = status(State.PLANNED), status(State.TRAINING, 1), status(State.DONE, 3)
FAILED = status(State.FAILED, 1, "no [space] left")


def console(terminal, height=30, width=160):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, height=height, color_system=None)


def test_plan_shows_cost_state_and_time_of_each_run():
    runs = plan(read_sweep("figA2"), ["s0"])
    states = {run.name: PLANNED for run in runs} | {
        runs[0].name: DONE,
        runs[1].name: FAILED,
    }
    screen = console(False)
    screen.print(plan_table(runs, states, {run.name: 600 for run in runs}))
    rows = {line.split()[1]: line for line in screen.file.getvalue().splitlines() if "cifar10" in line}
    assert len(rows) == 5
    assert "0.5554" in rows["cifar10-resnet18-at_dense-s0"]
    assert "min" not in rows["cifar10-resnet18-at_dense-s0"]
    assert "failed: no [space] left" in rows["cifar10-resnet18-at_small_dense-s0"]
    assert "10 min" in rows["cifar10-resnet18-advmoe-s0"]


def test_a_long_name_leaves_space_for_the_state():
    runs = [replace(plan(read_sweep("a1"))[0], name="cifar100-densenet121-at_small_dense-r0.25-per_expert-s12")]
    screen = console(False, width=80)
    screen.print(plan_table(runs, {runs[0].name: PLANNED}, {runs[0].name: 6420}))
    text = screen.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "planned" in text
    assert "expected" in text
    assert runs[0].name in "".join(line.split("│")[1].strip() for line in text.splitlines() if "│" in line)


def test_remaining_time_is_divided_but_no_shorter_than_the_longest_run(monkeypatch):
    monkeypatch.setattr(local, "cores", lambda: 2)
    placement = LocalPlacement(Request(5, Path("runs"), workers=2, threads=1, device="cpu"))
    assert remaining(5, 0, {}, None, "") == "5 runs, 5 done"
    assert remaining(1, 1, {"a": 5.0}, None, "") == "1 run, 0 done; the remaining run takes up to about 5 s (one after another)"
    assert "the other 3 take up to about 15 s (2 workers of 1 thread on cpu)" in remaining(
        5, 3, {"a": 10, "b": 10, "c": 10}, placement, ""
    )
    assert "about 50 s" in remaining(5, 3, {"a": 50, "b": 10, "c": 10}, placement, "")
    assert "about 30 s (one after another)" in remaining(5, 3, {"a": 10, "b": 10, "c": 10}, None, "")
    assert remaining(5, 3, {}, None, "no data").endswith("the time of the other 3 is unknown: no data")


def test_counts():
    states = {"a": TRAINING, "b": DONE, "c": DONE, "d": PLANNED, "e": status(State.TRAINED, 3), "f": FAILED}
    assert counts(states) == "2 done, 1 planned, 1 trained, 1 failed, 1 training"


def test_without_a_terminal_every_change_is_a_line(tmp_path):
    states, screen = {"a": PLANNED, "b": PLANNED}, console(False)
    with Board(screen, tmp_path, list(states), lambda name: states[name]) as board:
        board.refresh()
        states["b"] = TRAINING
        board.refresh()
        board.refresh()
        states["b"] = FAILED
        board.refresh()
    assert screen.file.getvalue() == "b: training epoch 2 of 3\nb: failed: no [space] left\n"


def test_on_a_terminal_the_table_fits_and_active_runs_come_first(tmp_path):
    states = {f"run-{number}": PLANNED for number in range(40)} | {"late": TRAINING}
    screen = console(True, height=12)
    with Board(screen, tmp_path, list(states), lambda name: states[name]) as board:
        board.refresh()
    output = screen.file.getvalue()
    assert "40 planned, 1 training" in output
    assert "late" in output
    assert "training epoch 2 of 3" in output
    assert "run-39" not in output

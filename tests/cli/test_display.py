import io
import logging
import sys

import pytest
from rich.console import Console

from advmoe.cli import display
from advmoe.cli.display import EvaluationProgress, TrainingProgress
from advmoe.cli.streams import warnings_on_stderr
from advmoe.evaluation.store import Shard


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def console(output: io.StringIO) -> Console:
    """A console that is not a terminal."""
    return Console(file=output)


def test_each_epoch_is_a_line(console: Console, output: io.StringIO) -> None:
    with TrainingProgress(console, "run", 3) as progress:
        for epoch in (1, 3):
            progress.epoch({
                "phase": 1, "score": 40.0, "epoch": epoch, "iterations": 10, "train_seconds": 5.0, "validate_seconds": 1.0,
                "loss": 2.5, "val_sa": 50.0, "val_ra": 40.0, "load": [[0.25, 0.75], [0.5, 0.5]],
            })  # fmt: skip
    assert output.getvalue().splitlines() == [
        "run  epoch 1/3  loss 2.500  held-out SA 50.0 RA 40.0  2.0 it/s  busiest expert 75%  12 s left",
        "run  epoch 3/3  loss 2.500  held-out SA 50.0 RA 40.0  2.0 it/s  busiest expert 75%",
    ]


def test_a_warning_is_one_line_above_the_live_line(
    output: io.StringIO, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log = logging.getLogger("advmoe")
    with warnings_on_stderr(), TrainingProgress(Console(file=output, force_terminal=True), "run", 3) as progress:
        log.warning("before")
        progress.iteration(1, 1, 100, {}, 0)
        log.warning("an expert [0] is dead")
        log.warning("an expert [0] is dead")  # once
    assert capsys.readouterr().err == "warning: before\n"
    assert output.getvalue().count("warning: an expert [0] is dead\n") == 1


def test_a_warning_goes_to_stderr_if_that_is_a_file(output: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    path = "a  folder/" * 20  # longer than the console is wide
    with warnings_on_stderr(), TrainingProgress(Console(file=output, force_terminal=True, width=80), "run", 3) as progress:
        progress.iteration(1, 1, 100, {}, 0)
        logging.getLogger("advmoe").warning("%s: is cut short", path)
    assert capsys.readouterr().err == f"warning: {path}: is cut short\n"
    assert "cut short" not in output.getvalue()


def test_the_live_line_starts_within_an_epoch_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate counts the iterations of this process, and starts anew with each epoch and after a return to a checkpoint."""
    times, states, started = iter([10.0, 12.0, 20.0, 21.0, 30.0, 35.0]), [], []
    progress = TrainingProgress(Console(file=io.StringIO(), force_terminal=True), "run", 3)
    monkeypatch.setattr(display.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(progress.progress, "update", lambda *_, **fields: states.append(fields.get("state")))
    monkeypatch.setattr(progress.progress, "start", lambda: started.append(True))
    for epoch, done in ((2, 91), (2, 92), (3, 1), (3, 2), (3, 1), (3, 2)):
        progress.iteration(epoch, done, 100, {}, 0)
    assert [state.strip() for state in states if state and state.strip()] == ["0.5 it/s", "1.0 it/s", "0.2 it/s"]
    assert len(started) == 3


def test_each_attack_on_a_shard_is_a_line_with_the_worst_case_so_far(console: Console, output: io.StringIO) -> None:
    with EvaluationProgress(console, "run", 2, log=True) as progress:
        progress.attacked("pgd_10", 0, Shard(rows=[0, 1, 2], correct=[0, 2], ever=[2]))
        progress.attacked("pgd_10", 1, Shard(rows=[3, 4], correct=[3, 4]))
        progress.attacked("pgd_50", 0, Shard(rows=[0, 1, 2], correct=[0, 2], ever=[0, 2]))
        progress.attacked("pgd_50", 1, Shard(rows=[3, 4], correct=[3, 4]), log=False)
    assert output.getvalue().splitlines() == [
        "run: shard 1/2 pgd_10 done; 1 of 3 images withstand every attack so far",
        "run: shard 2/2 pgd_10 done; 3 of 5 images withstand every attack so far",
        "run: shard 1/2 pgd_50 done; 2 of 5 images withstand every attack so far",
    ]

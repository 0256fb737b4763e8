import os
import threading
import time

import pytest
from pydantic import BaseModel

from advmoe.benchmark.process import ProcessFailed, run_in_process
from advmoe.cli.main import main


class Task(BaseModel):
    what: str


class Result(BaseModel):
    number: int


def work(task: Task):
    print("libraries print, too")
    yield Result(number=os.getpid())
    if task.what == "crash":
        os._exit(3)
    if task.what == "hang":
        time.sleep(60)
    yield Result(number=2)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    folder = os.path.dirname(__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]))


def test_results_come_from_another_process():
    first, second = run_in_process(work, Task(what="end"), Result)
    assert first.number not in (2, os.getpid())
    assert second.number == 2


def test_results_before_a_failure_are_kept():
    results = run_in_process(work, Task(what="crash"), Result)
    assert next(results).number > 2
    with pytest.raises(ProcessFailed, match="status 3"):
        next(results)


def test_a_process_that_takes_too_long_is_stopped():
    results = run_in_process(work, Task(what="hang"), Result, 87.5)
    assert next(results).number > 2
    (timer,) = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer) and thread.interval == 87.5]
    timer.function()  # as after 87.5 seconds
    with pytest.raises(ProcessFailed, match=r"stopped after 87\.5 s"):
        next(results)


# What the user sees


def test_a_failed_process_is_one_line(monkeypatch, capsys):
    """The suite streaming does not catch it."""
    monkeypatch.setattr("advmoe.cli.benchmark.measure", lambda *_: list(run_in_process(work, Task(what="crash"), Result)))
    assert main(["benchmark", "--suite", "streaming", "--quick", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.endswith("advmoe: error: the process ended with status 3\n")

import os
import time

import pytest
from pydantic import BaseModel

from advmoe.benchmark.process import ProcessFailed, run_in_process


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


@pytest.mark.parametrize(("what", "seconds", "why"), [("crash", None, "status 3"), ("hang", 8.0, "stopped after 8.0 s")])
def test_results_before_a_failure_are_kept(what, seconds, why):
    results = run_in_process(work, Task(what=what), Result, seconds)
    assert next(results).number > 2
    with pytest.raises(ProcessFailed, match=why):
        next(results)

"""SIGTERM and Ctrl-C: the current step is finished, everything is saved, and a line says how to resume."""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_runs import assert_same, drafts, end, in_a_step, start, trained, until

from advmoe.training.checkpoint import RunFolder

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

STEP = 5  # of 6 in two epochs: the second one's second
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
ArgumentsOf = Callable[..., list[str | Path]]


@pytest.mark.parametrize("number", STATUS)
def test_the_step_is_finished_and_saved(
    number: signal.Signals,
    method: str,
    arguments_of: ArgumentsOf,
    run: Path,
    unbroken: Callable[[str], Path],
    tried: Callable[..., Any],
) -> None:
    arguments = arguments_of(method)
    with tried("SIGTERM" if number == signal.SIGTERM else "Ctrl-C", method):
        with in_a_step(arguments, run, STEP) as process:
            process.send_signal(number)
            time.sleep(0.5)
            assert process.poll() is None  # the step is not done
        ended = end(process)
        assert ended.status == STATUS[number], ended.text
        saved = RunFolder(run).latest()
        assert saved is not None
        assert saved.partial is not None
        assert (len(saved.history), saved.partial.iteration) == (1, STEP - 3)
        assert drafts(run) == []
        assert "Traceback" not in ended.error
        assert re.search(r"^interrupted after epoch 2, iteration 2 of 3, which is saved; .*--resume", ended.error, flags=re.M)
        trained(*arguments)
        assert_same(run, unbroken(method))


def test_the_second_ctrl_c_ends_at_once(
    method: str, arguments_of: ArgumentsOf, run: Path, unbroken: Callable[[str], Path], tried: Callable[..., Any]
) -> None:
    arguments = arguments_of(method)
    with tried("Ctrl-C twice", method):
        with in_a_step(arguments, run, STEP) as process:
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            ended = end(process)  # though the step would go on
        assert ended.status == 130, ended.text
        assert "Traceback" not in ended.error
        saved = RunFolder(run).latest()
        assert saved is not None
        assert (len(saved.history), saved.partial) == (1, None)
        trained(*arguments)
        assert_same(run, unbroken(method))


@pytest.mark.parametrize("number", STATUS)
def test_before_the_first_step(
    number: signal.Signals, arguments_of: ArgumentsOf, run: Path, unbroken: Callable[[str], Path]
) -> None:
    """A signal while the network is built: no work is lost yet, so the process may simply end."""
    arguments = arguments_of("advmoe")
    process = start(arguments)
    until(run.exists, process)
    process.send_signal(number)
    ended = end(process)
    assert ended.status in (STATUS[number], -signal.SIGTERM), ended.text
    assert "Traceback" not in ended.error
    trained(*arguments)
    assert_same(run, unbroken("advmoe"))

"""Measure in a new process. It cannot reuse memory of another variant, and a crash or a hang affects no other measurement.

    python -m advmoe.benchmark.process MODULE:FUNCTION < task.json

FUNCTION takes its task, a pydantic model, and yields its results, pydantic models. Each result is printed as one line of JSON.
"""

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar, get_type_hints

from pydantic import BaseModel

from advmoe.errors import UserError
from advmoe.libraries import tune_libraries

Task = TypeVar("Task", bound=BaseModel)
Result = TypeVar("Result", bound=BaseModel)


class ProcessFailed(UserError):
    """A process failed, or took too long."""


def run_in_process(
    function: Callable[[Task], Iterable[Result]], task: Task, result: type[Result], seconds: float | None = None
) -> Iterator[Result]:
    """Run `function(task)` in a new process, and yield its results as they arrive.

    Raises ProcessFailed after the last result if the process fails, or runs for more than `seconds`.
    """
    command = [sys.executable, "-m", __name__, f"{function.__module__}:{function.__name__}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds or threading.TIMEOUT_MAX, stop)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(task.model_dump_json())
            process.stdin.close()
            for line in process.stdout:
                if line.endswith("\n"):  # the last line is incomplete if the process is killed
                    yield result.model_validate_json(line)
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
    if late.is_set():
        raise ProcessFailed(f"stopped after {seconds} s")
    if status != 0:
        raise ProcessFailed(f"the process ended with status {status}")


def main() -> None:
    """Run one function in this process. Output of libraries goes to stderr, so that stdout contains only results."""
    tune_libraries()
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    task = next(iter(get_type_hints(function).values())).model_validate_json(sys.stdin.read())
    for result in function(task):
        print(result.model_dump_json(), file=results, flush=True)


if __name__ == "__main__":
    main()

"""`advmoe` with a fault in it: python sabotage.py '{"fault": {its fields}, ...}' train ...

Faults that no signal, file or limit can cause from outside. They are planted in this process only; the package is not changed.
"""

import atexit
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from advmoe.cli.main import main
from advmoe.moe import routing
from advmoe.training import methods
from advmoe.training.losses import Loss

CHANGES = ("os.mkdir", "os.rmdir", "os.remove", "os.rename", "shutil.rmtree")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Writing


def changes(folder: str, callback: Callable[[int], None]) -> None:
    """`callback` gets the number of each change to files below `folder`, before it is made."""
    number = 0

    def audit(event: str, details: tuple[Any, ...]) -> None:
        nonlocal number
        writing = event == "open" and isinstance(details[1], str) and details[1][:1] in "wax" and details[1] != ""
        if (writing or event in CHANGES) and os.path.abspath(os.fsdecode(details[0])).startswith(folder):
            number += 1
            callback(number)

    sys.addaudithook(audit)


def count_changes(folder: str, to: str) -> None:
    """Write the number of changes below `folder` to the file `to` when the process ends."""
    latest = [0]
    changes(folder, lambda number: latest.__setitem__(0, number))
    atexit.register(lambda: Path(to).write_text(str(latest[0])))


def kill_at_change(folder: str, number: int) -> None:
    """SIGKILL right before the change of this number."""
    changes(folder, lambda reached: die() if reached == number else None)


def kill_half_written(name: str, number: int) -> None:
    """SIGKILL when the checkpoint file `name` has been half written for the `number`-th time."""
    remaining = [number]

    def halved(write: Callable[..., Any], path_of: Callable[..., Any]) -> Callable[..., Any]:
        def written(*args: Any, **fields: Any) -> Any:
            result, path = write(*args, **fields), Path(path_of(*args))
            if path.name == name and path.parent.name.startswith(".draft"):
                remaining[0] -= 1
                if remaining[0] == 0:
                    os.truncate(path, path.stat().st_size // 2)
                    die()
            return result

        return written

    torch.save = halved(torch.save, lambda content, path, *_: path)
    Path.write_text = halved(Path.write_text, lambda path, *_: path)  # type: ignore[method-assign]
    Path.write_bytes = halved(Path.write_bytes, lambda path, *_: path)  # type: ignore[method-assign]


# Steps


def each_step(before: Callable[[int, Any, Any], Any]) -> None:
    """Call `before(number, state, batches)` before every training step; it may return other batches for the step."""
    number = 0

    def wrapped(step: methods.Step) -> methods.Step:
        def changed_step(state: Any, batches: Any) -> Any:
            nonlocal number
            number += 1
            return step(state, before(number, state, batches) or batches)

        return changed_step

    for method in methods.METHODS.values():
        phases = tuple(dataclasses.replace(phase, step=wrapped(phase.step)) for phase in method.phases)
        object.__setattr__(method, "phases", phases)  # the command line refuses another entry of this name


def wait(step: int, seconds: float, marker: str) -> None:
    """Write the file `marker` at the beginning of a step, and wait until the file is removed or `seconds` have passed."""

    def before(number: int, state: Any, batches: Any) -> None:
        if number == step:
            Path(marker).write_text("in the step")
            end = time.monotonic() + seconds
            while time.monotonic() < end and Path(marker).exists():
                time.sleep(0.02)

    each_step(before)


def poison(source: str, value: str, first: int, times: int) -> None:
    """Set one number in the data, loss, router or gradient (`source`) to `value`, in steps `first` to `first` + `times` - 1."""
    bad = float(value)

    def data(state: Any, batches: Any) -> Any:
        poisoned = {level: (x.clone(), y) for level, (x, y) in batches.items()}
        for x, _ in poisoned.values():
            x[0, 0, 0, 0] = bad
        return poisoned

    def loss(state: Any, batches: Any) -> None:
        value = state.loss.value

        def once(*arguments: Any) -> Any:
            state.loss = Loss(state.loss.attack, value)
            outcome = value(*arguments)
            return outcome._replace(total=outcome.total * bad)

        state.loss = Loss(state.loss.attack, once)

    def router(state: Any, batches: Any) -> None:
        layer = next(module for module in state.model.modules() if isinstance(module, routing.Router))
        with torch.no_grad():
            layer.linear.bias[0] = bad

    def gradient(state: Any, batches: Any) -> None:
        level = list(state.optimizers)[-1]
        parameter = state.optimizers[level].param_groups[0]["params"][0]
        handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient * bad)[1])

    actions = {"data": data, "loss": loss, "router": router, "gradient": gradient}
    each_step(lambda number, state, batches: actions[source](state, batches) if first <= number < first + times else None)


# The machine


def clock_back() -> None:
    """A wall clock that runs backwards from a day ago."""
    start, begun = time.time() - 86400, time.monotonic()
    time.time = lambda: start - 10 * (time.monotonic() - begun)
    time.time_ns = lambda: math.floor(1e9 * time.time())


FAULTS: dict[str, Callable[..., None]] = {
    fault.__name__: fault for fault in (count_changes, kill_at_change, kill_half_written, wait, poison, clock_back)
}

if __name__ == "__main__":
    for fault, fields in json.loads(sys.argv[1]).items():
        FAULTS[fault](**fields)
    raise SystemExit(main(sys.argv[2:]))

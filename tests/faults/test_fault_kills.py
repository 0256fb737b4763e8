"""SIGKILL at any moment: a run resumes every time and ends as if it had never been killed."""

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fault_runs import ALWAYS, SEED, assert_same, drafts, end, rows, start, trained, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

AT_RANDOM, BEFORE_CHANGES = 11, 6
WRITTEN = ("model.safetensors", "optimizers.pt", "manifest.json")  # half
ArgumentsOf = Callable[..., list[str | Path]]


@dataclass
class Moment:
    """When to kill: after a share of a complete run's time since its folder exists, or by a planted fault."""

    share: float = 0.0
    fault: str = ""
    number: int = 0
    fields: dict[str, str] = field(default_factory=dict)

    def earlier(self, draw: random.Random) -> "Moment":
        """A moment that a nearly finished run still reaches."""
        return replace(self, share=self.share * draw.random(), number=draw.randint(1, max(1, self.number)))


def moments(changes: int, run: Path, draw: random.Random) -> list[Moment]:
    """Spread over a complete run and over its changes to files, in random order."""
    planned = [Moment((part + draw.random()) / AT_RANDOM) for part in range(AT_RANDOM)]
    for part in range(BEFORE_CHANGES):
        number = 1 + int(changes * (part + draw.random()) / BEFORE_CHANGES)
        planned.append(Moment(fault="kill_at_change", number=number, fields={"folder": str(run)}))
    planned += [Moment(fault="kill_half_written", number=draw.randint(1, 3), fields={"name": name}) for name in WRITTEN]
    draw.shuffle(planned)
    return planned


@dataclass
class Length:
    """Of a complete run: seconds until its folder exists and until its end, and changes to files."""

    first: float
    last: float
    changes: int


def measured(arguments: list[str | Path], run: Path) -> Length:
    counter, begun = run.with_name("changes"), time.monotonic()
    process = start([*arguments, *ALWAYS], {"count_changes": {"folder": str(run), "to": str(counter)}})
    until(run.exists, process)
    first = time.monotonic() - begun
    ended = end(process)
    assert ended.status == 0, ended.text
    return Length(first, time.monotonic() - begun, int(counter.read_text()))


def is_killed(arguments: list[str | Path], moment: Moment, length: Length) -> bool:
    """Whether a process that continues the run was killed before it had finished."""
    process = start([*arguments, *ALWAYS], {moment.fault: {**moment.fields, "number": moment.number}} if moment.fault else None)
    if not moment.fault:
        time.sleep(length.first + moment.share * (length.last - length.first))
        process.kill()
    ended = end(process)
    assert ended.status in (0, -9), ended.text
    return ended.status == -9


def test_killed_at_twenty_moments(
    method: str, arguments_of: ArgumentsOf, run: Path, unbroken: Callable[[str], Path], tally: Callable[..., Any]
) -> None:
    print(f"FAULTS_SEED={SEED}")
    draw, arguments, row, writing = random.Random(f"{SEED} {method}"), arguments_of(method), tally("SIGKILL", method), 0
    length = measured(arguments, run)
    planned = moments(length.changes, run, draw)
    while planned:
        moment = planned.pop()
        print(moment)
        if is_killed(arguments, moment, length):
            row["tried"] += 1
            writing += bool(run.exists() and drafts(run))
        else:
            planned.append(moment.earlier(draw))
        if planned and not run_is_done(run, unbroken(method)):
            continue
        trained(*arguments)
        assert_same(run, unbroken(method))
        row["survived"] = row["tried"]
        shutil.rmtree(run)
    assert row["tried"] == AT_RANDOM + BEFORE_CHANGES + len(WRITTEN) == 20
    assert writing >= len(WRITTEN)


def run_is_done(run: Path, complete: Path) -> bool:
    return (run / "metrics.jsonl").exists() and len(rows(run)) == len(rows(complete))

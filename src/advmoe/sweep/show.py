"""Prints a sweep: its plan, and the states of its runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from advmoe.runs.cost import estimate
from advmoe.runs.status import STYLES, RunStatus, State
from advmoe.sweep.placements import Placement
from advmoe.sweep.plan import Planned
from advmoe.wording import duration, number_of

ORDER = tuple(STYLES)  # if the terminal is too small for all runs, the first are listed
FRAME = 6  # lines of a table that are not rows

Statuses = Mapping[str, RunStatus]


def plan_table(runs: Sequence[Planned], statuses: Statuses, seconds: Mapping[str, float]) -> Table:
    """A row for each run: the ideal GMACs of its network, its state, and its remaining time."""
    table = Table()
    for title in ("run", "GMACs", "state", "expected"):
        text = title in ("run", "state")
        table.add_column(title, justify="left" if text else "right", no_wrap=not text, overflow="fold" if text else "ellipsis")
    for run in runs:
        status = statuses[run.name]
        expected = "" if status.is_evaluated else duration(seconds[run.name]) if run.name in seconds else "-"
        table.add_row(run.name, f"{estimate(run.config).gmacs:.4f}", _styled(status), expected)
    return table


def remaining(runs: int, missing: int, seconds: Mapping[str, float], placement: Placement | None, reason: str) -> str:
    """One line: the number of remaining runs, where they run, and their time. `reason` says why the time is unknown, if it is."""
    done = f"{number_of(runs, 'run')}, {runs - missing} done"
    if not missing:
        return done
    others = "the remaining run" if missing == 1 else f"the other {missing}"
    if reason:
        return f"{done}; the time of {others} is unknown: {reason}"
    at_once, where = (placement.workers, placement.description) if placement is not None else (1, "one after another")
    longest = max(*seconds.values(), sum(seconds.values()) / min(at_once, missing))
    return f"{done}; {others} take{'s' * (missing == 1)} up to about {duration(longest)} ({where})"


def counts(statuses: Statuses) -> str:
    """'3 done, 2 training, 20 planned'."""
    states = [status.state for status in statuses.values()]
    return ", ".join(f"{states.count(state)} {state}" for state in reversed(ORDER) if state in states)


class Board:
    """Displays the states of the runs: a live table in a terminal, otherwise a line for every change.

    `read` returns the status of one run; runs that are done are not read again.
    """

    def __init__(self, console: Console, out: Path, names: Sequence[str], read: Callable[[str], RunStatus]) -> None:
        self.console, self.out, self.read = console, out, read
        self.statuses = {name: read(name) for name in names}
        self.live = Live(console=console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live.is_started:
            self.live.stop()

    def refresh(self) -> None:
        """Read the states again and display them."""
        for name, before in self.statuses.items():
            if before.state is State.DONE:
                continue
            self.statuses[name] = status = self.read(name)
            if not self.live.is_started and status.describe() != before.describe():
                self.console.print(f"{name}: {status.describe()}", highlight=False, markup=False, soft_wrap=True)
        if self.live.is_started:
            head = Text(f"{self.out}: {counts(self.statuses)}", no_wrap=True, overflow="ellipsis")
            self.live.update(Group(head, self._table()), refresh=True)

    def _table(self) -> Table:
        table = Table("run", "state")
        names, rows = list(self.statuses), max(self.console.height - FRAME, 1)
        if len(names) > rows:
            names = sorted(names, key=lambda name: ORDER.index(self.statuses[name].state))[:rows]
        for name in names:
            table.add_row(name, _styled(self.statuses[name]))
        return table


def _styled(status: RunStatus) -> Text:
    return Text(status.describe(), STYLES[status.state])

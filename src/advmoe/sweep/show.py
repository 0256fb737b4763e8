"""A sweep in the terminal: its plan, its runs while they go."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from advmoe.runs.cost import estimate
from advmoe.sweep.placement import Placement
from advmoe.sweep.plan import Planned
from advmoe.sweep.states import State

STYLES = {"planned": "dim", "training": "cyan", "evaluating": "blue", "done": "green", "failed": "red"}
ORDER = ("training", "evaluating", "failed", "planned", "done")  # when not all of them fit on the terminal
FRAME = 6  # lines of a table that are no rows

States = Mapping[str, State]


def duration(seconds: float | None) -> str:
    """'40 s', '7 min', '3.5 h'; a dash for what is not known."""
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plan_table(runs: Sequence[Planned], states: States, seconds: Mapping[str, float]) -> Table:
    """Every run with the ideal GMACs of its network, its state and the time that remains of it."""
    table = Table()
    for title in ("run", "GMACs", "state", "expected"):
        table.add_column(title, justify="left" if title in ("run", "state") else "right", no_wrap=title != "state")
    for run in runs:
        left = "" if states[run.name].kind == "done" else duration(seconds.get(run.name))
        table.add_row(run.name, f"{estimate(run.config).gmacs:.4f}", _styled(states[run.name]), left)
    return table


def remaining(runs: int, missing: int, seconds: Mapping[str, float], placement: Placement | None, reason: str) -> str:
    """What is to be done, where and for how long, in a line; `reason` says why that is not known."""
    done = f"{runs} runs, {runs - missing} done"
    if not missing:
        return done
    if reason:
        return f"{done}; how long the other {missing} take is not known: {reason}"
    at_once, where = (placement.workers, placement.what) if placement is not None else (1, "one after another")
    longest = max(*seconds.values(), sum(seconds.values()) / min(at_once, missing))
    return f"{done}; the other {missing} take up to about {duration(longest)} ({where})"


def counts(states: States) -> str:
    """'3 done, 2 training, 20 planned'."""
    kinds = [state.kind for state in states.values()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in reversed(ORDER) if kind in kinds)


class Board:
    """The runs' states: a live table on a terminal, elsewhere a line for every change."""

    def __init__(self, console: Console, out: Path, read: Callable[[], States]) -> None:
        self.console, self.out, self.read = console, out, read
        self.states: dict[str, State] = dict(read())
        self.live = Live(console=console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> "Board":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live.is_started:
            self.live.stop()

    def look(self) -> None:
        """Read the states anew and show them."""
        states = self.read()
        changed = [name for name, state in states.items() if state != self.states[name]]
        self.states.update(states)
        if self.live.is_started:
            head = f"{self.out}: {counts(self.states)}"
            self.live.update(Group(Text(head, no_wrap=True, overflow="ellipsis"), self._table()), refresh=True)
            return
        for name in changed:
            self.console.print(f"{name}: {states[name]}", highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table("run", "state")
        names = list(self.states)
        room = max(self.console.height - FRAME, 1)
        if len(names) > room:
            names = sorted(names, key=lambda name: ORDER.index(self.states[name].kind))[:room]
        for name in names:
            table.add_row(name, _styled(self.states[name]))
        return table


def _styled(state: State) -> str:
    return f"[{STYLES[state.kind]}]{escape(str(state))}[/]"

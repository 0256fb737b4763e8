"""`advmoe watch`: runs as a table in the terminal."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from advmoe.cli.arguments.watch import WatchArguments
from advmoe.cli.streams import console
from advmoe.errors import UserError, printable
from advmoe.evaluation.record import Record
from advmoe.reports.measures import label, worst_of
from advmoe.runs.status import STYLES, RunStatus, State, find_runs, read_run
from advmoe.wording import duration, number_of

OFF_TERMINAL = 240  # columns if the output is not a terminal: programs that read it get all columns
WORST, TEST_SA = label("ra_worst"), f"test {label('sa')}"
COLUMNS = ("run", "state", "method", "dataset", "epoch", "loss", "SA", "RA", "least load", "it/s", "changed", WORST, TEST_SA)
SPARK = "RA by epoch"
SPARKS, SPARK_WIDTH = "▁▂▃▄▅▆▇█", 16
# columns that are dropped, in this order, if the terminal is too narrow
EXPENDABLE = (SPARK, "it/s", "dataset", TEST_SA, "least load", "loss", "changed")


def run(arguments: WatchArguments) -> None:
    folder, terminal = arguments.folder, console()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if arguments.once or not terminal.is_terminal:
        if not (runs := statuses(folder)):
            raise UserError(f"{folder}: holds no run (no config.yaml in it or below)")
        if not terminal.is_terminal:
            terminal.width = OFF_TERMINAL
        terminal.print(watch_view(runs, folder, terminal))
        return
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the view
        _live(folder, terminal, arguments.interval)


def _live(folder: Path, terminal: Console, interval: float) -> None:
    with Live(_view(folder, terminal), console=terminal, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(_view(folder, terminal), refresh=True)


def _view(folder: Path, terminal: Console) -> RenderableType:
    runs = statuses(folder)
    return watch_view(runs, folder, terminal) if runs else f"no run below {folder} yet"


def statuses(folder: Path) -> list[RunStatus]:
    """All runs in `folder`, at any depth, those in progress first."""
    order = list(STYLES)
    return sorted((read_run(run) for run in find_runs(folder)), key=lambda run: (order.index(run.state), str(run.path)))


def watch_view(runs: Sequence[RunStatus], root: Path, console: Console) -> RenderableType:
    """A table with a row for each run, and a line with the reason for each failed run."""
    reasons = [
        Text(printable(f"{_name(run, root)}: {' '.join(run.reason.splitlines())}"), STYLES[run.state]) for run in runs if run.reason
    ]
    return Group(watch_table(runs, root, console), *reasons)


def watch_table(runs: Sequence[RunStatus], root: Path, console: Console) -> Table:
    """One row for each run, in as many columns as fit on `console`. SA and RA are in percent of the held-out images."""
    names = [*COLUMNS, *([] if console.options.ascii_only else [SPARK])]
    cells = [_cells(run, root) for run in runs]
    for dropped in EXPENDABLE:
        table = _table(names, cells)
        if console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width:
            return table
        names = [name for name in names if name != dropped]
    return _table(names, cells)


def _table(names: Sequence[str], cells: Sequence[dict[str, str | Text]]) -> Table:
    table = Table(
        title=f"{number_of(len(cells), 'run')}; SA and RA of the held-out part, in %",
        title_justify="left",
    )
    for name in names:
        left_aligned = name in ("run", "state", "method", "dataset", SPARK)
        table.add_column(name, justify="left" if left_aligned else "right", no_wrap=name != "run", overflow="fold")
    for row in cells:
        table.add_row(*(row[name] for name in names))
    return table


def _cells(run: RunStatus, root: Path) -> dict[str, str | Text]:
    """Column -> text, which is empty if the figure is not in the files."""
    last = run.rows[-1] if run.rows else None
    seconds = last.train_seconds if last else 0.0
    return {
        "run": _name(run, root),
        "state": Text(f"{run.state}{f', {run.shards} shards' if run.state is State.EVALUATING else ''}", STYLES[run.state]),
        "method": run.config.method if run.config else "",
        "dataset": run.config.data.dataset if run.config else "",
        "epoch": f"{run.epoch}{f'/{run.epochs}' if run.epochs else ''}",
        "loss": _text(last.loss, ".3f") if last else "",
        "SA": _text(last.val_sa) if last else "",
        "RA": _text(last.val_ra) if last else "",
        "least load": f"{min(last.load):.0%}" if last and last.load else "",
        "it/s": f"{(last.iterations or 0.0) / seconds:.1f}" if last and seconds else "",
        "changed": duration(run.age),
        WORST: _worst(run.record) if run.record else "",
        TEST_SA: _text(run.record.sa) if run.record else "",
        SPARK: sparkline([row.val_ra or 0.0 for row in run.rows]),
    }


def _name(run: RunStatus, root: Path) -> str:
    return printable(run.path.resolve().name if run.path == root else str(run.path.relative_to(root)))


def _worst(record: Record) -> str:
    """The worst case, marked with its attacks if the evaluation was not complete: '30.0 (quick)'."""
    return f"{record.worst:.1f}{worst_of(record).label.removeprefix(WORST)}"


def _text(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def sparkline(values: Sequence[float]) -> str:
    """Non-negative values as at most SPARK_WIDTH block characters, the largest full. If there are more values, each block is a
    mean."""
    count = min(len(values), SPARK_WIDTH)
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    top = max(means, default=0.0) or 1.0
    return "".join(SPARKS[round((len(SPARKS) - 1) * max(0.0, mean) / top)] for mean in means)

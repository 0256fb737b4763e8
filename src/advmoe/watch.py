"""Runs as a table in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from advmoe.evaluation.record_rules import is_number
from advmoe.runs.status import Phase, RunState, find_runs, number, read_run

STYLES: dict[Phase, str] = {  # in the order in which runs are shown: what goes on first
    "training": "green", "evaluating": "green", "stalled": "yellow", "failed": "red", "trained": "cyan", "done": "dim",
}  # fmt: skip
COLUMNS = ("run", "state", "method", "dataset", "epoch", "loss", "SA", "RA", "least load", "it/s", "seen", "RA-worst", "test SA")
SPARK = "RA by epoch"
SPARKS, SPARK_WIDTH = "▁▂▃▄▅▆▇█", 16
EXPENDABLE = (SPARK, "it/s", "dataset", "test SA", "least load", "loss", "seen")  # what a narrow terminal goes without, first first
UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


def states(folder: Path) -> list[RunState]:
    """All runs below `folder`, those first that go on."""
    order = list(STYLES)
    return sorted((read_run(run) for run in find_runs(folder)), key=lambda run: (order.index(run.state), str(run.path)))


def watch_view(runs: Sequence[RunState], root: Path, console: Console) -> RenderableType:
    """A table with a row for each run, and below it, line by line, why some failed."""
    reasons = [Text(f"{_name(run, root)}: {run.reason}", STYLES[run.state]) for run in runs if run.reason]
    return Group(watch_table(runs, root, console), *reasons)


def watch_table(runs: Sequence[RunState], root: Path, console: Console) -> Table:
    """One row a run, in as many columns as `console` has room for. SA and RA are the held-out part's, in percent."""
    names = [*COLUMNS, *([] if console.options.ascii_only else [SPARK])]
    cells = [_cells(run, root) for run in runs]
    for spare in EXPENDABLE:
        table = _table(names, cells)
        if console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width:
            return table
        names = [name for name in names if name != spare]
    return _table(names, cells)


def _table(names: Sequence[str], cells: Sequence[dict[str, str]]) -> Table:
    table = Table(
        title=f"{len(cells)} run{'s' if len(cells) != 1 else ''}; SA and RA of the held-out part, in %", title_justify="left"
    )
    for name in names:
        left = name in ("run", "state", "method", "dataset", SPARK)
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "run", overflow="fold")
    for row in cells:
        table.add_row(*(row[name] for name in names))
    return table


def _cells(run: RunState, root: Path) -> dict[str, str]:
    """Column -> text; what the files do not tell is blank."""
    last: dict[str, Any] = run.rows[-1] if run.rows else {}
    load = [share for layer in _lists(last.get("load")) for share in _numbers(layer)]
    seconds, epochs = number(last, "train_seconds"), f"/{run.epochs}" if run.epochs else ""
    return {
        "run": escape(_name(run, root)),
        "state": f"[{STYLES[run.state]}]{run.state}{f', {run.shards} shards' if run.state == 'evaluating' else ''}[/]",
        "method": run.config.method if run.config else "",
        "dataset": escape(run.config.data.dataset) if run.config else "",
        "epoch": f"{run.epoch}{epochs}",
        "loss": _text(last, "loss", ".3f"),
        "SA": _text(last, "val_sa"),
        "RA": _text(last, "val_ra"),
        "least load": f"{min(load):.0%}" if load else "",
        "it/s": f"{number(last, 'iterations') / seconds:.1f}" if seconds else "",
        "seen": age(run.age),
        **_recorded(run.record or {}),
        SPARK: sparkline([number(row, "val_ra") for row in run.rows]),
    }


def _name(run: RunState, root: Path) -> str:
    return run.path.resolve().name if run.path == root else str(run.path.relative_to(root))


def _recorded(record: dict[str, Any]) -> dict[str, str]:
    """The Record's figures; RA-worst (quick) is marked, as it is an upper bound."""
    worst = _text(record, "ra_worst") or (quick and f"{quick} (quick)" if (quick := _text(record, "ra_worst_quick")) else "")
    return {"RA-worst": worst, "test SA": _text(record, "sa")}


def _text(row: dict[str, Any], name: str, form: str = ".1f") -> str:
    return format(number(row, name), form) if is_number(row.get(name)) else ""


def _lists(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(value: Any) -> list[float]:
    return [float(item) for item in _lists(value) if is_number(item)]


def age(seconds: float) -> str:
    """'12 s', '3 min', '5 h' or '2 d'."""
    return next((f"{seconds / size:.0f} {unit}" for size, unit in UNITS if seconds >= size), f"{seconds:.0f} s")


def sparkline(values: Sequence[float]) -> str:
    """Values from 0 up as a line of at most SPARK_WIDTH blocks, the highest full; where there are more, each block is a mean."""
    count = min(len(values), SPARK_WIDTH)
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    top = max(means, default=0.0) or 1.0
    return "".join(SPARKS[round((len(SPARKS) - 1) * max(0.0, mean) / top)] for mean in means)

"""Run suites: print each row when it is measured, and write all rows to a file."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from advmoe.benchmark.rows import Report, Row
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.suites import SUITES, USUAL
from advmoe.benchmark.suites.growth import draw
from advmoe.errors import UserError, lookup
from advmoe.files import check_target


def run(suites: Sequence[str], out: Path | None, echo: Callable[[str], None], setup: Setup) -> list[Row]:
    """Run `suites` (keys of SUITES; none means USUAL), pass each row to `echo` as a line, and return all rows.

    `out` is a JSON file (`Report`). It is written after every row, so that a process that is stopped keeps its rows. The growth
    suite draws its figure beside it (NAME-growth.png). Raises UserError if a suite is unknown or something that it needs is
    missing, and if `out` cannot be written.
    """
    chosen = [lookup(SUITES, name, "suite") for name in suites or USUAL]
    on_cpu = [name for name in suites if SUITES[name].on_cpu]
    if on_cpu and setup.device.type != "cpu":
        raise UserError(f"suite {on_cpu[0]} measures on the CPU: give --device cpu")
    if out is not None:
        check_target(out, "the results")
    for suite in chosen:
        suite.check(setup)
    echo(f"{torch.get_num_threads()} threads, {setup.device}, torch {torch.__version__}; medians (least to greatest of a round)")
    rows: list[Row] = []
    for suite in chosen:
        for row in suite.measure(setup):
            rows.append(row)
            echo(str(row))
            if out is not None:
                Report.of(rows).write(out)
    if out is not None and any(row.suite == "growth" for row in rows):
        draw(rows, out.with_name(f"{out.stem}-growth.png"))
    return rows

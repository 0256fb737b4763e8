"""Is the system as fast as its cost says? Ratios of variants that take turns in one run, beside their targets."""

from collections.abc import Callable
from pathlib import Path

import torch

from advmoe.benchmark.growth import draw
from advmoe.benchmark.rows import Found, Row, write_found
from advmoe.benchmark.suites import SUITES
from advmoe.benchmark.variants import Scale
from advmoe.errors import UserError, lookup

CPU = torch.device("cpu")
AS_STATED = Scale()


def run(
    suites: tuple[str, ...],
    out: Path | None,
    echo: Callable[[str], None],
    *,
    device: torch.device = CPU,
    scale: Scale = AS_STATED,
) -> list[Row]:
    """Run `suites` (keys of SUITES; none means all), tell each row to `echo` once it is known, and give all rows.

    `out` is a JSON file; it is written after every comparison, so that an interrupted run leaves what it has. The growth suite
    draws its figure beside it (NAME-growth.png). Raises UserError on an unknown suite and where `out` cannot be.
    """
    chosen = [lookup(SUITES, name, "suite") for name in suites or SUITES]
    _check_out(out)
    echo(f"{torch.get_num_threads()} threads, {device}, torch {torch.__version__}; ratios of medians (and of single rounds)")
    found: list[Found] = []
    for suite in chosen:
        for one in suite(scale, device):
            found.append(one)
            for row in one.rows:
                echo(str(row))
            if out is not None:
                write_found(out, found)
    _draw_growth(found, out)
    return [row for one in found for row in one.rows]


def _check_out(out: Path | None) -> None:
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"{out}: results go to a file in a folder that exists")


def _draw_growth(found: list[Found], out: Path | None) -> None:
    grown = [one for one in found if any(row.suite == "growth" for row in one.rows)]
    if out is not None and grown:
        draw(grown, out.with_name(f"{out.stem}-growth.png"))


__all__ = ["SUITES", "Row", "Scale", "run"]

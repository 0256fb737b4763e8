"""The arguments of `advmoe report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from advmoe.cli.parsing import Flag, parse
from advmoe.errors import UserError


@dataclass(frozen=True)
class ReportArguments:
    """Make tables, figures and report.html from the Records of evaluated runs, beside the figures of the paper."""

    runs: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUNS")]
    """A folder with evaluated runs or with JSON files of Records, or one such file."""
    out: Path
    """Folder for the report: report.html, tables/ and figures/."""
    schema: Flag = False
    """Only print the JSON Schema of a Record; then RUNS and --out are not given."""
    json: Flag = False
    """Print the verdict, the claims and the written files as JSON."""


def read(argv: list[str]) -> ReportArguments:
    if argv == ["--schema"]:
        return ReportArguments(runs=Path(), out=Path(), schema=True)
    if "--schema" in argv:
        raise UserError("--schema takes no other argument: advmoe report --schema")
    return parse(ReportArguments, "report", argv)

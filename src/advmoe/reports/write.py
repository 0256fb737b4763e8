"""Writes a report: its tables, figures and page."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from advmoe.errors import UserError, reason_of
from advmoe.evaluation.record import Record
from advmoe.files import write_atomically, write_json
from advmoe.locks import turn
from advmoe.reports.claims import Claim, judge
from advmoe.reports.html import report_html
from advmoe.reports.markup import Statement, Table, csv_text, latex, markdown
from advmoe.reports.paper_tables import tables
from advmoe.reports.plots import FIGURES
from advmoe.reports.verdict import verdict

logger = logging.getLogger("advmoe")
FORMS = {"md": markdown, "csv": csv_text, "tex": latex}
LIST = ".made.json"  # the files of the last report: the next one deletes those that it does not overwrite


def write_report(
    records: Sequence[Record], out: Path, answers: Sequence[Statement] = ()
) -> tuple[list[str], list[Claim], list[Statement]]:
    """Write tables, figures and report.html, each complete or not at all; return their names, the claims and the verdict.

    A warning names each figure that cannot be drawn; the rest is written. `answers` come first on the page, and the verdict does
    not repeat them. If another process writes a report to the same folder, this one follows it.
    """
    _make_folders(out)
    with turn(out / ".report.lock"):
        return _write_files(records, out, answers)


def _write_files(
    records: Sequence[Record], out: Path, answers: Sequence[Statement]
) -> tuple[list[str], list[Claim], list[Statement]]:
    report_tables, claims = tables(records), judge(records)
    statements = list(dict.fromkeys([*answers, *verdict(records)]))
    written = _write_tables(report_tables, out)
    drawn, failed = _draw_figures(list(records), out)
    figures = {Path(name).stem: out / name for name in drawn if name.endswith(".png")}
    html = report_html(list(records), report_tables, claims, statements, figures, failed)
    write_atomically(out / "report.html", html)
    written += [*drawn, "report.html"]
    _delete_earlier(out, written)
    return written, claims, statements


def _write_tables(report_tables: Sequence[Table], out: Path) -> list[str]:
    written = []
    for table in report_tables:
        for suffix, text in FORMS.items():
            written.append(f"tables/{table.name}.{suffix}")
            write_atomically(out / written[-1], text(table))
    return written


def _draw_figures(records: list[Record], out: Path) -> tuple[list[str], list[str]]:
    """Draw the figures that the Records have data for; return their files, and the names of the figures that failed."""
    written, failed = [], []
    for name, draw in FIGURES.items():
        files = [f"figures/{name}.{suffix}" for suffix in ("png", "pdf")]
        try:
            written += [file for file in files if draw(records, out / file)]
        except Exception as error:  # a drawing library may raise anything for odd Records; the rest of the report is still written
            if isinstance(error, OSError) and error.errno:
                raise  # an error of the disk, not of the figure
            for file in files:
                (out / file).unlink(missing_ok=True)
            failed.append(name)
            logger.warning("left out, figures/%s: could not be drawn (%s)", name, reason_of(error, named=True))
    return written, failed


def _delete_earlier(out: Path, written: Sequence[str]) -> None:
    """Delete the files of an earlier report that this one did not write, and store the list of this one's files."""
    try:
        earlier = json.loads((out / LIST).read_text())
    except (OSError, ValueError, RecursionError):
        earlier = []
    for file in (out / str(name) for name in (earlier if isinstance(earlier, list) else []) if name not in written):
        if file.parent in (out / "tables", out / "figures") and not file.is_dir():
            file.unlink(missing_ok=True)
    write_json(out / LIST, list(written))


def _make_folders(out: Path) -> None:
    for folder in (out / "tables", out / "figures"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            file = next(path for path in (*reversed(out.parents), out, folder) if path.exists() and not path.is_dir())
            reason = f"{out}: is a file" if file == out else f"{out}: {file} is a file"
            raise UserError(f"{reason}; --out takes a folder") from None

"""`advmoe report`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from advmoe.cli.arguments.report import ReportArguments
from advmoe.errors import UserError
from advmoe.evaluation.record import Record, record_schema
from advmoe.files import write_atomically, write_json
from advmoe.reports.cells import summarise
from advmoe.reports.claims import Claim, judge, verdict
from advmoe.reports.collect import Warn, collect
from advmoe.reports.html import report_html
from advmoe.reports.markup import Table, csv_text, latex, markdown
from advmoe.reports.paper_tables import tables
from advmoe.reports.plots import FIGURES

FORMS = {"md": markdown, "csv": csv_text, "tex": latex}
MADE = ".made.json"  # names of what a report wrote: the next one into the same folder takes away what it does not make again


def run(arguments: ReportArguments) -> None:
    if arguments.schema:
        print(json.dumps(record_schema(), indent=1))
        return
    records = collect(arguments.folder, _warn)
    made, claims, sentences = write_report(records, arguments.out, _warn)
    if arguments.json:
        content = {"records": len(records), "verdict": sentences, "claims": [asdict(claim) for claim in claims], "files": made}
        print(json.dumps(content))
        return
    print(*sentences, "", *(f"{claim.verdict:12} {claim.text}" for claim in claims), "", sep="\n")
    places = f"{arguments.out}: report.html, tables/ ({', '.join(FORMS)}), figures/ (png, pdf)"
    print(f"Written from {len(records)} Record{'s' * (len(records) > 1)} to {places}")


def write_report(
    records: Sequence[Record], out: Path, warn: Warn, answers: Sequence[str] = ()
) -> tuple[list[str], list[Claim], list[str]]:
    """Write tables, figures and report.html, each whole or not at all; give their names, the claims and the verdict.

    `warn` gets one line for each figure that cannot be drawn; the rest is made. `answers` come first on the page.
    """
    _make_folders(out)
    shown, claims, sentences = tables(records), judge(records), [*answers, *verdict(records)]
    made = _write_tables(shown, out)
    drawn, failed = _draw_figures(list(records), out, warn)
    figures = {Path(name).stem: out / name for name in drawn if name.endswith(".png")}
    html = report_html(list(records), summarise(records), shown, claims, sentences, figures, failed)
    write_atomically(out / "report.html", html)
    made += [*drawn, "report.html"]
    _sweep_up(out, made)
    return made, claims, sentences


def _write_tables(shown: Sequence[Table], out: Path) -> list[str]:
    made = []
    for table in shown:
        for suffix, text in FORMS.items():
            made.append(f"tables/{table.name}.{suffix}")
            write_atomically(out / made[-1], text(table))
    return made


def _draw_figures(records: list[Record], out: Path, warn: Warn) -> tuple[list[str], list[str]]:
    """Those that the Records have something for, as files; and the names of those that failed."""
    made, failed = [], []
    for name, draw in FIGURES.items():
        files = [f"figures/{name}.{suffix}" for suffix in ("png", "pdf")]
        try:
            made += [file for file in files if draw(records, out / file)]
        except Exception as error:  # whatever a drawing library makes of odd Records, the rest of the report is made
            if isinstance(error, OSError) and error.errno:
                raise  # a full disk is not the figure's fault
            for file in files:
                (out / file).unlink(missing_ok=True)
            failed.append(name)
            warn(f"left out, figures/{name}: could not be drawn ({type(error).__name__}: {error})")
    return made, failed


def _sweep_up(out: Path, made: Sequence[str]) -> None:
    """Delete the files that an earlier report wrote and this one did not, and list the files of this one."""
    try:
        earlier = json.loads((out / MADE).read_text())
    except (OSError, ValueError):
        earlier = []
    for name in earlier if isinstance(earlier, list) else []:
        if name not in made and Path(str(name)).parent in (Path("tables"), Path("figures")):
            (out / str(name)).unlink(missing_ok=True)
    write_json(out / MADE, list(made))


def _make_folders(out: Path) -> None:
    for folder in (out / "tables", out / "figures"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            file = next(place for place in (*reversed(out.parents), out, folder) if place.exists() and not place.is_dir())
            place = f"{out}: is a file" if file == out else f"{out}: {file} is a file"
            raise UserError(f"{place}; --out takes a folder") from None


def _warn(text: str) -> None:
    print(f"warning: {' '.join(text.split())}", file=sys.stderr)

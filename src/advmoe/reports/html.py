"""The report as one HTML file that contains its style, script, figures and images and loads nothing from the network."""

import base64
import hashlib
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from advmoe.evaluation.record import Record
from advmoe.reports.captions import CAPTIONS, Caption
from advmoe.reports.cell import Cell, is_full_scale, is_routed
from advmoe.reports.claims import INTERVALS, Claim
from advmoe.reports.markup import Entry, Statement, Table
from advmoe.reports.measures import SUMMARY, Measure
from advmoe.reports.panels import DPI
from advmoe.reports.paper_tables import MEANING, Notes, ours
from advmoe.reports.run_details import Run, run_of
from advmoe.reports.styles import radius, style_of
from advmoe.reports.summaries import Summary, summarise
from advmoe.reports.verdict import networks_table
from advmoe.reports.words import WORDS
from advmoe.wording import number_of

MARKS = {"supported": "✓", "contradicted": "✗", "not shown": "?", "pass": "✓", "fail": "✗", "warn": "!", "skipped": "–"}
FIRST_LINES = 8  # of the verdict; the remaining lines are folded
LEADS = 3  # answers in large type
NEEDED = {  # field of a Record -> what is missing without it
    "history": "accuracies after every epoch",
    "layers": "MoE layers",
    "load_by_class": "load of the experts by class",
    "epsilon_curve": "accuracies at other radii",
    "gallery": "images",
}
CSS_DPI = 105
OF_ROUTING = ("layers", "load_by_class")


@dataclass(frozen=True)
class Drawn:
    """A figure's PNG in base64, and its size in CSS pixels, at which its text is about as large as the page's."""

    caption: Caption
    png: str
    width: int
    height: int


def report_html(
    records: Sequence[Record], tables: Sequence[Table], claims: Sequence[Claim], verdict: Sequence[Statement],
    figures: Mapping[str, Path], failed: Collection[str] = (),
) -> str:  # fmt: skip
    """The page. `figures` are the PNG files that were drawn, by their names in `advmoe.reports.plots.FIGURES`; `failed` are the
    names of those that raised an error.

    Text from Records is escaped, and the page's Content-Security-Policy allows only its own style and script.
    """
    runs = [run_of(record) for record in records]
    environment = Environment(
        loader=PackageLoader("advmoe", "reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = (files("advmoe").joinpath("reports", f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return environment.get_template("report.html.jinja").render(
        style=Markup(style), script=Markup(script), policy=_policy(style, script),
        subtitle=_subtitle(records), leads=_leads(verdict), verdict=verdict, networks=networks_table(records),
        first_lines=FIRST_LINES, claims=claims, intervals=INTERVALS, marks=MARKS,
        tables=[_overview(summarise(records)), *map(_without_meaning, sorted(tables, key=lambda table: not table.run_rows))],
        meaning=MEANING,
        figures=_drawn(figures), undrawn=_undrawn(figures, failed),
        runs=runs, gallery_runs=_with_images(runs), gaps=_gaps(records),
        words=WORDS,
    )  # fmt: skip


def _leads(verdict: Sequence[Statement]) -> list[str]:
    """The first answer, and the others to a question: 'Does choosing an expert help? Not shown.'"""
    return [line.answer for number, line in enumerate(verdict) if number == 0 or "?" in line.answer][:LEADS]


def _policy(style: str, script: str) -> str:
    """The Content-Security-Policy: nothing from the network, and only this style and this script."""
    hashes = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in (("s", style), ("j", script))
    }
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['s']}'; script-src 'sha256-{hashes['j']}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _subtitle(records: Sequence[Record]) -> str:
    """'9 runs of 5 methods on fashion-mnist; newest from 2026-11-22'."""
    methods, datasets = {record.method for record in records}, dict.fromkeys(record.dataset for record in records)
    newest = max(str(record.time) for record in records)[:10]
    return f"{number_of(len(records), 'run')} of {number_of(len(methods), 'method')} on {', '.join(datasets)}; newest from {newest}"


def _without_meaning(table: Table) -> Table:
    """The table without the text that the page prints once, above all tables."""
    return replace(table, about=table.about.removesuffix(MEANING).strip())


def _overview(summaries: Sequence[Summary]) -> Table:
    """The table of every cell that was run, of all settings."""
    names = {name for summary in summaries for name in (*summary.figures, *summary.mixed)}
    measures, notes = [measure for measure in SUMMARY if measure.name in names], Notes(summaries)
    columns = ("method", "r", "N", "data", "n", *(measure.column for measure in measures), "network")
    columns = (*columns, "epochs", "training images", "test images", "radius")
    rows = tuple(_overview_row(summary, measures, notes) for summary in summaries)
    about = (
        "Compare rows of one setting only: the same data, network, epochs, images and radius. A row's note says which other "
        "settings are unlike the default."
    )
    return Table("overview", "All runs", columns, rows, about, tuple(notes.texts))


def _overview_row(summary: Summary, measures: Sequence[Measure], notes: Notes) -> tuple[Entry, ...]:
    cell, unusual = summary.cell, "; ".join(summary.departures)
    marks = notes.mark(f"Settings unlike the default, which is in brackets: {unusual}.") if unusual else ()
    return (
        Entry(style_of(cell).title, marks=marks), _number(cell.model_scale) if not is_full_scale(cell.method) else Entry("–"),
        _number(cell.num_experts) if is_routed(cell.method) else Entry("–"), Entry(cell.dataset), _number(summary.n),
        *(ours(summary, measure.name, notes) for measure in measures), Entry(_network(cell)), _number(cell.epochs),
        _number(cell.train_images), _number(cell.test_images),
        Entry(f"{radius(cell.epsilon)} {cell.norm}", cell.epsilon),
    )  # fmt: skip


def _number(value: float) -> Entry:
    return Entry(f"{value:g}" if value < 1e5 else str(value), value)


def _network(cell: Cell) -> str:
    return cell.backbone if cell.width is None else f"{cell.backbone} (width {cell.width})"


def _drawn(figures: Mapping[str, Path]) -> list[Drawn]:
    drawn = []
    for name, caption in CAPTIONS.items():
        if name in figures:
            png = figures[name].read_bytes()
            sides = [round(side * CSS_DPI / DPI) for side in Image.open(io.BytesIO(png)).size]
            drawn.append(Drawn(caption, base64.b64encode(png).decode(), *sides))
    return drawn


def _undrawn(figures: Mapping[str, Path], failed: Collection[str]) -> list[str]:
    absent = {name: caption for name, caption in CAPTIONS.items() if name not in figures}
    return [
        f"{caption.title}: " + ("could not be drawn." if name in failed else f"no run has {caption.needs}.")
        for name, caption in absent.items()
    ]


def _with_images(runs: Sequence[Run]) -> list[Run]:
    """Runs for the gallery: those with colour images first, then routed networks, AdvMoE first among them."""
    shown = [(run, run.gallery.colour) for run in runs if run.gallery]
    shown.sort(key=lambda pair: (not pair[1], not is_routed(pair[0].method), pair[0].method != "advmoe"))
    return [run for run, _ in shown]


def _gaps(records: Sequence[Record]) -> list[str]:
    """One line for each field that Records lack, as those of older schemas do."""
    lines = []
    for name, what in NEEDED.items():
        relevant = [record for record in records if is_routed(record.method) or name not in OF_ROUTING]
        without_figure = sum(not getattr(record, name) for record in relevant)
        if without_figure:
            lines.append(f"{without_figure} of {number_of(len(relevant), 'run')}: no {what} in the Record.")
    old = sum(record.from_schema is not None for record in records)
    if lines and old:
        lines.append(f"{number_of(old, 'Record')} of an older version: evaluate these runs again to record all of it.")
    return lines

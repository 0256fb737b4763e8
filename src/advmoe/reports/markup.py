"""The parts of a report: a table with its Markdown, CSV and LaTeX, and a statement of the verdict."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

FORMULA = ("=", "+", "-", "@")
MARKDOWN = re.compile(r"([\\`*_|<>\[\]#~])")
LATEX = {
    "\\": r"\textbackslash{}", "|": r"\textbar{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$",
}  # fmt: skip


class Statement(NamedTuple):
    """A part of the verdict: an answer in one short sentence, and the figures behind it."""

    answer: str
    figures: str = ""

    def __str__(self) -> str:
        return f"{self.answer} {self.figures}".strip()


@dataclass(frozen=True)
class Entry:
    """One cell: its text, the value it is sorted by (None if it holds no number), the value's sample deviation if there is one,
    and the numbers, from 1, of the notes it refers to."""

    text: str
    value: float | None = None
    spread: float | None = None
    marks: tuple[int, ...] = ()

    @property
    def marked(self) -> str:
        """The text with its notes' numbers: '52.22 [1]'."""
        return " ".join([self.text, *(f"[{mark}]" for mark in self.marks)])


@dataclass(frozen=True)
class Table:
    """`name` is the stem of the table's file names; every row has one entry for each column. `about` describes the table, and an
    entry's marks are numbers of the `notes`; both are printed below. The last `not_run` rows are cells that were not run: the page
    folds them."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    about: str = ""
    notes: tuple[str, ...] = ()
    not_run: int = 0

    @property
    def run_rows(self) -> tuple[tuple[Entry, ...], ...]:
        """The rows of cells that were run."""
        return self.rows[: len(self.rows) - self.not_run]

    @property
    def other_rows(self) -> tuple[tuple[Entry, ...], ...]:
        """The rows of cells that were not run."""
        return self.rows[len(self.rows) - self.not_run :]

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers; such columns are aligned to the right."""
        return any(row[column].value is not None for row in self.rows)

    def numbered_notes(self) -> list[str]:
        """The notes as lines: '[1] ...'."""
        return [f"[{number}] {note}" for number, note in enumerate(self.notes, 1)]


def markdown(table: Table) -> str:
    """As a GitHub-flavoured Markdown table below its title."""
    rules = ["---:" if table.is_number(column) else "---" for column in range(len(table.columns))]
    rows = [[_plain(entry.marked) for entry in row] for row in table.rows]
    lines = [_bar(_plain(column) for column in table.columns), _bar(rules), *(_bar(row) for row in rows)]
    below = [text for line in (table.about, *table.numbered_notes()) if line for text in ("", _plain(line))]
    return "\n".join([f"### {_plain(table.title)}", "", *lines, *below]) + "\n"


def _bar(texts: Iterator[str] | list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _plain(text: str) -> str:
    """The text on one line, with Markdown's special characters escaped."""
    return MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def csv_text(table: Table) -> str:
    """As CSV for programs: the first column is the table's title; numbers are unformatted, deviations have separate columns, and
    notes are written out.

    A text that a spreadsheet would read as a formula gets an apostrophe in front, as OWASP advises.
    """
    spreads = [any(row[column].spread is not None for row in table.rows) for column in range(len(table.columns))]
    head = [[name, f"{name}, deviation"] if spread else [name] for name, spread in zip(table.columns, spreads, strict=True)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["table", *(_harmless(name) for names in head for name in names), "notes"])
    for row in table.rows:
        fields = [field for entry, spread in zip(row, spreads, strict=True) for field in _fields(entry, spread)]
        marks = dict.fromkeys(mark for entry in row for mark in entry.marks)
        writer.writerow([_harmless(table.title), *fields, _harmless("; ".join(table.notes[mark - 1] for mark in marks))])
    return stream.getvalue()


def _harmless(text: str) -> str:
    """The text without control characters, and with an apostrophe in front if a spreadsheet would read it as a formula."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return f"'{plain}" if plain.startswith(FORMULA) else plain


def _fields(entry: Entry, spread: bool) -> list[str]:
    first = _harmless(entry.text) if entry.value is None else _number(entry.value)
    return [first, *([_number(entry.spread)] if spread else [])]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def latex(table: Table) -> str:
    """As a LaTeX table, scaled to the width of the text; needs the package graphicx."""
    columns = "".join("r" if table.is_number(column) else "l" for column in range(len(table.columns)))
    rows = [" & ".join(_tex(entry.marked) for entry in row) + r" \\" for row in table.rows]
    head = " & ".join(_tex(column) for column in table.columns) + r" \\"
    below = [rf"\par\footnotesize {_tex(line)}" for line in (table.about, *table.numbered_notes()) if line]
    lines = [
        r"\begin{table}", rf"\caption{{{_tex(table.title)}}}", r"\resizebox{\textwidth}{!}{%", rf"\begin{{tabular}}{{{columns}}}",
        r"\hline", head, r"\hline", *rows, r"\hline", r"\end{tabular}}", *below, r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in " ".join(text.split()))

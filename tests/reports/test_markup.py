"""A table as Markdown, CSV and LaTeX."""

import csv
import io
import re

import pytest

from advmoe.reports.markup import Entry, Table, csv_text, latex, markdown

NASTY = r"a|b & 50% of $x_1 {y} #2 \z ~^ <i>"


@pytest.fixture
def table():
    rows = (
        (Entry(NASTY), Entry("1.50 ± 0.25", 1.5, 0.25, (2,)), Entry("7", 7)),
        (Entry("plain"), Entry("not run"), Entry("8", 8, marks=(1, 2))),
    )
    return Table("name", "A | title_1", ("who", "RA, %", "n"), rows, "holds for 100 % of it", ("first", "sec|ond"))


def test_markdown_has_as_many_bars_in_every_row(table):
    lines = markdown(table).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 4
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}
    assert rows[1] == "| --- | ---: | ---: |"
    assert rows[3] == r"| plain | not run | 8 \[1\] \[2\] |"
    assert lines[0] == r"### A \| title\_1"
    assert lines[-5:] == ["holds for 100 % of it", "", r"\[1\] first", "", r"\[2\] sec\|ond"]
    assert r"\<i\>" in rows[2]


def test_csv_has_bare_numbers_and_what_the_notes_say(table):
    head, first, second = csv.reader(io.StringIO(csv_text(table)))
    assert head == ["table", "who", "RA, %", "RA, %, deviation", "n", "notes"]
    assert first == ["A | title_1", NASTY, "1.5", "0.25", "7", "sec|ond"]
    assert second == ["A | title_1", "plain", "not run", "", "8", "first; sec|ond"]


def test_latex_escapes_all_that_means_something_there(table):
    text = latex(table)
    assert r"a\textbar{}b \& 50\% of \$x\_1 \{y\} \#2 \textbackslash{}z \textasciitilde{}\textasciicircum{} \textless{}i" in text
    assert r"1.50 $\pm$ 0.25 [2] & 7 \\" in text
    assert r"\begin{tabular}{lrr}" in text
    assert r"\footnotesize [2] sec\textbar{}ond" in text
    bare = re.sub(r"\\[&%$#_{}]|\\\\", "", text)
    assert bare.count("{") == bare.count("}")
    assert len(re.findall(r"(?<!\\)&", text)) == 3 * 2


def test_line_breaks_in_names_break_no_row():
    table = Table("name", "two\nlines", ("a\nb",), ((Entry("c\n\nd"),),))
    assert markdown(table).splitlines() == ["### two lines", "", "| a b |", "| --- |", "| c d |"]
    assert r"c d \\" in latex(table)


def test_a_table_without_rows_has_its_head():
    table = Table("name", "empty", ("a", "b"), ())
    assert markdown(table).splitlines()[2:] == ["| a | b |", "| --- | --- |"]
    assert csv_text(table) == "table,a,b,notes\n"
    assert r"a & b \\" in latex(table)


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\r=1", "\x00=1"]


@pytest.mark.parametrize("text", FORMULAS)
def test_csv_holds_no_formula(text):
    table = Table("name", text, (text, "n"), ((Entry(text), Entry("-5", -5.0, marks=(1,))),), notes=(text,))
    head, row = csv.reader(io.StringIO(csv_text(table)))
    for field in (head[1], row[0], row[1], row[3]):
        assert field == "'" + text.strip(" \t\r\x00")
    assert row[2] == "-5"

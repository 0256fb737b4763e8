"""Records with one garbled value: each is left out or read without a part, and the rest of the report is made."""

import json
import random

import pytest
from json_trees import REMOVED, json_paths, with_value
from records import content, record

from advmoe.errors import UserError
from advmoe.evaluation.record_file import checked_record
from advmoe.reports import plots, routes
from advmoe.reports.claims import judge
from advmoe.reports.html import report_html
from advmoe.reports.paper_tables import tables
from advmoe.reports.verdict import verdict

VALUES = (
    REMOVED, None, "x", [], {}, float("nan"), float("inf"), -1, True, [["a"]], {"a": 1}, 10**30, 1.5, ["x"],
    "<script>alert(1)</script>", "$\\frac$",
)  # fmt: skip
VALID = [record("at_dense", depth=2, epochs=2), record("advmoe", 0, 0.2, depth=2, epochs=2)]
BASE = content("advmoe", depth=2, epochs=2)
BASE["gallery"] = [row | {"steps": row["steps"][:1]} for row in BASE["gallery"][:2]]
CRASHED = [  # values with which reports once ended in a traceback
    (("epsilon_curve",), float("nan")), (("gallery", 0), []), (("gallery", 0, "label"), REMOVED), (("history", 0, "val_ra"), "x"),
    (("load_by_class",), [["a"]]), (("hardware",), float("nan")), (("evaluation", "figures", "sa"), []),
    (("evaluation", "attacks", "pgd_50"), {"a": 1}), (("evaluation", "attacks", "pgd_50", "seconds"), "x"), (("ra_worst",), 1e30),
    (("ra_aa",), {"a": 1}), (("evaluation", "figures", "ra_aa"), "<script>"),
]  # fmt: skip


def garbled(path, value):
    return with_value(BASE, path, value)


@pytest.fixture
def read(caplog):
    """read(path, value): the garbled Record as a report reads it, or None if it is left out; with at most one warning."""

    def read_garbled(path, value):
        caplog.clear()
        try:
            result, lines = checked_record(garbled(path, value), "here"), caplog.messages
        except UserError as error:
            result, lines = None, [str(error)]
        assert len(lines) <= 1
        assert all(line.startswith("here: ") and "\n" not in line for line in lines)
        return result

    return read_garbled


def write_all(records):
    """Write the whole report; raises if it cannot handle a Record."""
    page = report_html(records, tables(records), judge(records), verdict(records), {})
    json.dumps([record.to_json() for record in records])
    assert "<script>alert" not in page


ALL = [(path, value) for path in json_paths(BASE) for value in VALUES]


def test_a_report_is_written_whatever_one_record_contains(read):
    """For a sample of all changes, the same in every run."""
    for path, value in random.Random(0).sample(ALL, 60):
        result = read(path, value)
        if result is not None:
            write_all([result, *VALID])


def test_every_garbled_value_is_read_or_refused_in_one_line(read):
    assert sum(read(path, value) is None for path, value in ALL) > len(ALL) / 4


@pytest.mark.parametrize(("path", "value"), CRASHED)
def test_what_ended_in_a_traceback_before(path, value, read):
    result = read(path, value)
    if path[0] in ("epsilon_curve", "gallery", "history", "load_by_class", "hardware"):
        assert not getattr(result, path[0])
        write_all([result, *VALID])
    else:
        assert result is None


def test_figures_are_drawn_whatever_one_record_contains(tmp_path, monkeypatch, read):
    """Without writing the files, which is slow and tested elsewhere."""
    monkeypatch.setattr(plots, "save", lambda figure, path: None)
    monkeypatch.setattr(routes, "save", lambda figure, path: None)
    parts = ("epsilon_curve", "gallery", "history", "load_by_class", "layers", "classes", "ra", "gmacs", "run")
    cases = [(path, value) for path, value in ALL if path[0] in parts]
    for path, value in random.Random(1).sample(cases, 12):
        result = read(path, value)
        for draw in plots.FIGURES.values() if result else ():
            draw([result, *VALID], tmp_path / "x.png")

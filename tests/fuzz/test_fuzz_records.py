"""Records, read one by one and collected by a report."""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from damage_bytes import damaged, odd_trees
from driver import counts, drive, read
from hypothesis import strategies as st
from json_trees import REMOVED, JsonPath, json_paths, with_value

from advmoe.errors import UserError
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_file import read_record
from advmoe.evaluation.robustbench import model_info
from advmoe.reports.claims import judge
from advmoe.reports.collect import collect
from advmoe.reports.html import report_html
from advmoe.reports.paper_tables import tables
from advmoe.reports.verdict import verdict


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    """A small Record of the repository, reduced to one layer and one image."""
    path = Path(__file__).parents[2] / "results/embedded/records.json"
    record: dict[str, Any] = next(row for row in json.loads(path.read_text()) if row["method"] == "advmoe" and row["gallery"])
    record["history"], record["layers"], record["gallery"] = record["history"][:1], record["layers"][:1], record["gallery"][:1]
    record["load_by_class"] = record["load_by_class"][:1]
    for side in ("clean", "adversarial"):
        record["gallery"][0][side]["route"] = record["gallery"][0][side]["route"][:1]
    record["evaluation"]["flags"] = ""
    return record


def with_changes(tree: Any, changes: list[tuple[JsonPath, Any]]) -> Any:
    """A copy with other values at some paths; a path that an earlier change removed is skipped."""
    tree = copy.deepcopy(tree)
    for path, value in changes:
        with contextlib.suppress(KeyError, IndexError, TypeError):
            tree = with_value(tree, path, value)
    return tree


def contents(base: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """A Record with odd values, alone, in a list or with names twice; its damaged text; other JSON; random bytes."""
    change = st.tuples(st.sampled_from(list(json_paths(base))), st.one_of(st.just(REMOVED), odd_trees()))
    garbled = st.lists(change, max_size=3).map(lambda changes: with_changes(base, changes))
    text = json.dumps(base)
    forms = st.sampled_from(["{0}", "[{0}]", "[{0}, {0}]", '{{"schema": 1, "schema": 2, "x": {0}}}', "[" * 50 + "{0}" + "]" * 50])
    documents = st.builds(lambda form, tree: form.format(json.dumps(tree)), forms, st.one_of(garbled, odd_trees()))
    odd = st.sampled_from(
        [
            "[" * 100_000,
            '{"a":' * 100_000,
            "1" * 5000,
            '{"schema": 1e999}',
            '{"schema": 2, "sa": ' + "9" * 4000 + "}",
            "\ufeff{}",
            "NaN",
            text.replace('"sa"', '"sa": 1, "sa"', 1),
            text.replace('"method"', '"method": [], "method"', 1),
        ]
    )
    return st.one_of(st.one_of(documents, odd).map(str.encode), damaged(text.encode()), st.binary(max_size=30))


@counts
def test_records(
    inputs: int, request: pytest.FixtureRequest, tmp_path: Path, base: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A Record that can be read is also collected; both can be written as text."""
    (tmp_path / "record.json").write_text("{}")
    path, number = tmp_path / "record.json", -1

    def check(content: bytes) -> None:
        nonlocal number
        number += 1
        path.write_bytes(content)
        caplog.clear()
        single, collected = read(lambda: read_record(path)), read(lambda: collect(tmp_path))
        assert all(line.isprintable() and len(line) < 4000 for line in caplog.messages)
        if isinstance(single, Record):
            json.dumps(model_info(single))
            assert collected == [single]
        if not isinstance(collected, UserError) and number % 20 == 0:  # writing a page is slow
            assert "<script>alert" not in report_html(collected, tables(collected), judge(collected), verdict(collected), {})

    check(json.dumps(base).encode())  # some libraries create folders at their first use
    assert isinstance(read(lambda: read_record(path)), Record)
    drive(request, inputs, "Record (JSON)", contents(base), tmp_path, check)

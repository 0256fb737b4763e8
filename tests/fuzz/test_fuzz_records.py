"""Records, alone and as a report collects them."""

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
from advmoe.reports.claims import judge, verdict
from advmoe.reports.collect import collect
from advmoe.reports.html import report_html
from advmoe.reports.paper_tables import tables


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    """A small Record of the repository, cut down to one layer and one image."""
    path = Path(__file__).parents[2] / "results/embedded/records.json"
    found: dict[str, Any] = next(own for own in json.loads(path.read_text()) if own["method"] == "advmoe" and own["gallery"])
    found["history"], found["layers"], found["gallery"] = found["history"][:1], found["layers"][:1], found["gallery"][:1]
    found["load_by_class"] = found["load_by_class"][:1]
    for side in ("clean", "adversarial"):
        found["gallery"][0][side]["route"] = found["gallery"][0][side]["route"][:1]
    found["evaluation"]["flags"] = ""
    return found


def with_changes(tree: Any, changes: list[tuple[JsonPath, Any]]) -> Any:
    """A copy with other values at some paths; a path that an earlier change removed is skipped."""
    tree = copy.deepcopy(tree)
    for path, value in changes:
        with contextlib.suppress(KeyError, IndexError, TypeError):
            tree = with_value(tree, path, value)
    return tree


def contents(base: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """A Record with odd values, alone, in a list or with names twice; its text after damage; other JSON; mere bytes."""
    change = st.tuples(st.sampled_from(list(json_paths(base))), st.one_of(st.just(REMOVED), odd_trees()))
    garbled = st.lists(change, max_size=3).map(lambda changes: with_changes(base, changes))
    text = json.dumps(base)
    forms = st.sampled_from(["{0}", "[{0}]", "[{0}, {0}]", '{{"schema": 1, "schema": 2, "x": {0}}}', "[" * 50 + "{0}" + "]" * 50])
    made = st.builds(lambda form, tree: form.format(json.dumps(tree)), forms, st.one_of(garbled, odd_trees()))
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
    return st.one_of(st.one_of(made, odd).map(str.encode), damaged(text.encode()), st.binary(max_size=30))


@counts
def test_records(inputs: int, request: pytest.FixtureRequest, tmp_path: Path, base: dict[str, Any]) -> None:
    """A Record that is read alone is one that a report collects, and both can say it in words."""
    (tmp_path / "record.json").write_text("{}")
    path, number = tmp_path / "record.json", -1

    def check(content: bytes) -> None:
        nonlocal number
        number += 1
        path.write_bytes(content)
        warnings: list[str] = []
        alone, found = read(lambda: read_record(path)), read(lambda: collect(tmp_path, warnings.append))
        assert all(line.isprintable() and len(line) < 4000 for line in warnings)
        if isinstance(alone, Record):
            json.dumps(model_info(alone))
            assert found == [alone]
        if not isinstance(found, UserError) and number % 20 == 0:  # a page takes as long as many readings
            assert "<script>alert" not in report_html(found, tables(found), judge(found), verdict(found), {})

    check(json.dumps(base).encode())  # libraries that make folders of their own when they are first used have made them
    assert isinstance(read(lambda: read_record(path)), Record)
    drive(request, inputs, "Record (JSON)", contents(base), tmp_path, check)

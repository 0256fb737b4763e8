import json

import pytest
import torch

from advmoe import benchmark
from advmoe.benchmark import SUITES, Scale, run
from advmoe.benchmark.growth import found as grown
from advmoe.benchmark.rows import compared
from advmoe.errors import UserError


@pytest.fixture
def suites(monkeypatch):
    """Suites that measure nothing, and which of them ran at what scale."""
    ran = []

    def suite(name):
        def measure(scale, device):
            ran.append((name, scale, device))
            if name == "growth":
                yield grown("batch", "seconds", {1: 1.0, 2: 2.0})
            else:
                yield compared(name, "x", "seconds", {"a": [3.0], "b": [1.0]}, [("a", "b", ">= 2.0")])

        return measure

    monkeypatch.setattr(benchmark, "SUITES", {name: suite(name) for name in SUITES})
    return ran


def test_chosen_suites_run_in_their_order_and_are_told_row_by_row(suites, tmp_path):
    lines, out = [], tmp_path / "found.json"
    rows = run(("data", "inference"), out, lines.append)
    assert [name for name, *_ in suites] == ["data", "inference"]
    assert [(row.name, row.ratio, row.met, row.suite) for row in rows] == [
        ("x: a / b", 3.0, True, "data"),
        ("x: a / b", 3.0, True, "inference"),
    ]
    assert f"{torch.get_num_threads()} threads" in lines[0]
    assert lines[1:] == [str(row) for row in rows]
    assert [row["suite"] for row in json.loads(out.read_text())["rows"]] == ["data", "inference"]
    assert list(tmp_path.iterdir()) == [out]


def test_all_suites_at_the_targets_scale_where_none_is_named(suites):
    run((), None, lambda line: None)
    assert suites == [(name, Scale(), torch.device("cpu")) for name in SUITES]


def test_growth_has_its_figure_beside_the_results(suites, tmp_path):
    run(("growth",), tmp_path / "found.json", lambda line: None)
    assert {path.name for path in tmp_path.iterdir()} == {"found.json", "found-growth.png"}


def test_what_was_measured_before_an_interruption_is_kept(suites, monkeypatch, tmp_path):
    def stopped(scale, device):
        raise KeyboardInterrupt

    monkeypatch.setitem(benchmark.SUITES, "attack", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(("data", "attack"), tmp_path / "found.json", lambda line: None)
    assert len(json.loads((tmp_path / "found.json").read_text())["rows"]) == 1


def test_unknown_suite_is_named_before_anything_runs(suites):
    with pytest.raises(UserError, match="unknown suite 'attak': did you mean attack"):
        run(("data", "attak"), None, print)
    assert not suites


def test_results_that_cannot_be_written_stop_it_before_anything_runs(suites, tmp_path):
    for out in (tmp_path, tmp_path / "none" / "found.json"):
        with pytest.raises(UserError, match="folder that exists"):
            run(("data",), out, print)
    assert not suites

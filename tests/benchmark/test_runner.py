import inspect
import json

import pytest
import torch

from advmoe.benchmark import runner
from advmoe.benchmark.rows import Report, Row, compare
from advmoe.benchmark.runner import run
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.suites import SUITES, USUAL, Suite
from advmoe.benchmark.suites.growth import fitted
from advmoe.errors import UserError

SETUP = Setup()


@pytest.fixture
def suites(monkeypatch):
    """Replaces the suites by ones that measure nothing; the list of suites that ran, with their setups."""
    ran = []

    def suite(name):
        def measure(setup):
            ran.append((name, setup))
            if name == "growth":
                yield from fitted("batch", "s", {1: 1.0, 2: 2.0})
            else:
                yield from compare(name, "x", "s", {"a": [3.0], "b": [1.0]}, [("a", "b", ">= 2.0")])

        return Suite(measure)

    monkeypatch.setattr(runner, "SUITES", {name: suite(name) for name in SUITES})
    return ran


def test_chosen_suites_run_in_their_order_and_are_printed_row_by_row(suites, tmp_path):
    lines, out = [], tmp_path / "rows.json"
    rows = run(("data", "inference"), out, lines.append, SETUP)
    assert [name for name, _ in suites] == ["data", "inference"]
    ratios = [(row.name, row.value, row.met, row.suite) for row in rows if row.unit == "ratio"]
    assert ratios == [("x: a / b", 3.0, True, "data"), ("x: a / b", 3.0, True, "inference")]
    assert f"{torch.get_num_threads()} threads" in lines[0]
    assert lines[1:] == [str(row) for row in rows]
    assert Report.read(out).rows == tuple(rows)
    assert list(tmp_path.iterdir()) == [out]


def test_the_usual_suites_run_by_default(suites):
    run((), None, lambda line: None, SETUP)
    assert suites == [(name, SETUP) for name in USUAL]


def test_the_figure_of_growth_is_written_beside_the_results(suites, tmp_path):
    run(("growth",), tmp_path / "rows.json", lambda line: None, SETUP)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.json", "rows-growth.png"}


def test_every_row_is_kept_before_the_next_one_is_measured(suites, monkeypatch, tmp_path):
    kept = []

    def measured(setup):
        yield Row(suite="attack", case="y", what="z", value=1.0)
        kept.extend(json.loads((tmp_path / "rows.json").read_text())["rows"])
        raise KeyboardInterrupt

    monkeypatch.setitem(runner.SUITES, "attack", Suite(measured))
    with pytest.raises(KeyboardInterrupt):
        run(("data", "attack"), tmp_path / "rows.json", lambda line: None, SETUP)
    assert len(kept) == 4
    assert kept[-1]["what"] == "z"


def test_mistakes_are_reported_before_anything_runs(suites, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="unknown suite 'attak': did you mean attack"):
        run(("data", "attak"), None, print, SETUP)
    for out, message in (
        (tmp_path, "is a folder; the results must go to a file"),
        (tmp_path / "none" / "rows.json", "no such folder for the results"),
    ):
        with pytest.raises(UserError, match=message):
            run(("data",), out, print, SETUP)
    for name, message in (("cuda", "no CUDA device"), ("low_precision", "--runs RUN")):
        monkeypatch.setitem(runner.SUITES, name, SUITES[name])
        with pytest.raises(UserError, match=message):
            run(("data", name), None, print, SETUP)
    assert not suites


@pytest.mark.parametrize("name", SUITES)
def test_suites_that_measure_on_the_cpu_refuse_another_device(name, tmp_path):
    if "setup.device" in inspect.getsource(inspect.getmodule(SUITES[name].measure)):
        assert not SUITES[name].on_cpu
        return
    with pytest.raises(UserError, match=f"^suite {name} measures on the CPU: give --device cpu$"):
        run((name,), None, print, Setup(device=torch.device("cuda"), runs=(tmp_path,)))

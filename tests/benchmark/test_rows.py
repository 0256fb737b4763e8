import sys

import pytest

from advmoe.benchmark.machine import Machine
from advmoe.benchmark.rows import Report, Row, compare
from advmoe.errors import UserError

ROUNDS = {"dense": [6.0, 9.0, 30.0], "MoE": [2.0, 4.5, 5.0]}


def rows(*ratios):
    return list(compare("inference", "ResNet-18", "s", ROUNDS, ratios))


def ratio(value, target):
    return Row(suite="x", case="c", what="a / b", value=value, spread=(1.0, 5.0), target=target)


def test_a_ratio_is_of_medians_and_its_spread_of_rounds():
    dense, moe, ratio_row = rows(("dense", "MoE", ">= 3.0"))
    assert (dense.value, dense.spread, dense.unit, moe.value) == (9.0, (6.0, 30.0), "s", 4.5)
    assert (ratio_row.name, ratio_row.value, ratio_row.spread, ratio_row.met) == ("ResNet-18: dense / MoE", 2.0, (2.0, 6.0), False)


@pytest.mark.parametrize(
    ("value", "target", "verdict"),
    [(3.0, ">= 3.0", True), (2.99, ">= 3.0", False), (0.75, "<= 0.75", True), (0.76, "<= 0.75", False), (1.0, None, None)],
)
def test_targets(value, target, verdict):
    assert ratio(value, target).met is verdict


@pytest.mark.parametrize(
    ("row", "end"),
    [
        (ratio(2.0, ">= 3.0"), "2.00 (1.00 to 5.00), target >= 3.0: missed"),
        (ratio(3.0, ">= 3.0"), "3.00 (1.00 to 5.00), target >= 3.0: met"),
        (ratio(3.0, None), "3.00 (1.00 to 5.00)"),
        (Row(suite="x", case="c", what="a", value=0.0125, unit="s", spread=(0.01, 2.0)), "12.5 ms (10 to 2000)"),
        (Row(suite="x", case="c", what="a", value=3e6, unit="bytes"), " 3 MB"),
        (Row(suite="x", case="c", what="a", value=41.5, unit="images/s"), "41.5 images/s"),
        (Row(suite="x", case="c", what="a", value=None, unit="count"), "not measured"),
        (Row(suite="x", case="c", what="a", value=None, failed="OSError: no"), "failed: OSError: no"),
    ],
)
def test_row_as_a_line(row, end):
    assert str(row).startswith(row.name)
    assert str(row).endswith(end)


def test_a_ratio_needs_equal_numbers_of_rounds():
    with pytest.raises(ValueError, match="zip"):
        list(compare("data", "x", "s", {"a": [1.0], "b": [1.0, 2.0]}, [("a", "b", None)]))


def test_file_holds_rows_and_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py", "benchmark", "--json", "x"])
    path = tmp_path / "rows.json"
    measured = rows(("dense", "MoE", ">= 3.0"))
    Report.of(measured).write(path)
    report = Report.read(path)
    assert list(tmp_path.iterdir()) == [path]
    assert report.rows == tuple(measured)
    assert report.command == "advmoe benchmark --json x"
    assert report.machine == Machine.of_this_process()
    assert report.machine.memory > 2**28
    assert {"torch", "numpy"} <= report.machine.libraries.keys()
    assert '"met": false' in path.read_text()


def test_a_damaged_installation_of_a_package_loses_no_results(tmp_path, monkeypatch):
    """pip can leave folders of distributions without METADATA."""
    for name in ("unknown-1.dist-info", "pillow-1.dist-info"):
        (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    libraries = Report.of(rows(("dense", "MoE", ">= 3.0"))).machine.libraries
    assert "torch" in libraries
    assert "pillow" not in libraries


def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"rows": []}')
    with pytest.raises(UserError, match=r"rows.json: not a file of advmoe benchmark") as error:
        Report.read(path)
    assert "\n" not in str(error.value)

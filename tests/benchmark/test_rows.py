import json
import sys

import pytest

from advmoe.benchmark.rows import Row, compared, machine, met, write_found

MEASURED = {"dense": [6.0, 9.0, 30.0], "MoE": [2.0, 4.5, 5.0]}


def rows(*ratios):
    return compared("inference", "ResNet-18", "seconds", MEASURED, ratios).rows


def test_ratio_is_that_of_medians_and_spread_that_of_rounds():
    assert rows(("dense", "MoE", ">= 3.0")) == (Row("ResNet-18: dense / MoE", 2.0, ">= 3.0", False, (2.0, 6.0), "inference"),)


@pytest.mark.parametrize(
    ("value", "target", "verdict"),
    [(3.0, ">= 3.0", True), (2.99, ">= 3.0", False), (0.75, "<= 0.75", True), (0.76, "<= 0.75", False), (1.0, None, None)],
)
def test_targets(value, target, verdict):
    assert met(value, target) is verdict


@pytest.mark.parametrize(
    ("target", "said"), [(">= 3.0", "target >= 3.0: missed"), (">= 2.0", "target >= 2.0: met"), (None, "6.00)")]
)
def test_row_as_a_line(target, said):
    (row,) = rows(("dense", "MoE", target))
    assert str(row).endswith(said)
    assert "2.00 (2.00 to 6.00)" in str(row)


def test_rounds_that_do_not_pair_are_no_ratio():
    with pytest.raises(ValueError, match="zip"):
        compared("data", "x", "seconds", {"a": [1.0], "b": [1.0, 2.0]}, [("a", "b", None)])


def test_file_holds_rows_medians_and_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["advmoe", "benchmark", "--json", "x"])
    path = tmp_path / "found.json"
    held = compared("training", "peak memory", "bytes", {"a": [3e6, 1e6], "b": [4e6, 4e6]}, [("a", "b", "<= 0.75")])
    write_found(path, [compared("inference", "ResNet-18", "seconds", MEASURED, [("dense", "MoE", None)]), held])
    kept = json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path]
    assert kept["seconds"] == {"ResNet-18": {"dense": 9.0, "MoE": 4.5}}
    assert kept["bytes"] == {"peak memory": {"a": 2e6, "b": 4e6}}
    assert [row["name"] for row in kept["rows"]] == ["ResNet-18: dense / MoE", "peak memory: a / b"]
    assert kept["rows"][1] == {
        "name": "peak memory: a / b", "ratio": 0.5, "target": "<= 0.75", "met": True, "spread": [0.25, 0.75], "suite": "training",
    }  # fmt: skip
    assert kept["command"] == "advmoe benchmark --json x"
    assert kept["machine"].keys() >= {"cpu", "cores", "threads", "memory", "torch", "python", "platform", "advmoe"}


def test_machine_knows_its_memory():
    assert machine()["memory"] > 2**28

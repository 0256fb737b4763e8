import re
from dataclasses import replace

import pytest

from advmoe.reports import paper_costs
from advmoe.reports.paper_costs import judged_cells, judged_lines, judged_rows

MARKED = {  # by hand from the tables and the counts
    ("resnet18", 1.0): {"at_dense"},
    ("resnet18", 0.2): {"at_small_dense", "at_sparse", "at_moe", "advmoe"},
    ("wrn28_10", 0.2): {"at_moe", "advmoe"},
    ("wrn28_10", 0.5): {"at_moe", "advmoe"},
    ("wrn28_10", 0.8): {"at_small_dense", "at_sparse", "at_moe", "advmoe"},
}


@pytest.fixture(scope="module")
def judged():
    return judged_cells()


def reasons(judged, model, scale, method):
    return next(
        entry.reasons for entry in judged if (entry.cell.model, entry.cell.model_scale, entry.cell.method) == (model, scale, method)
    )


def test_exactly_the_cells_that_cannot_be_right_are_marked(judged):
    for entry in judged:
        expected = entry.cell.method in MARKED.get((entry.cell.model, entry.cell.model_scale), set())
        assert bool(entry.reasons) == expected, entry


def test_small_resnet_at_model_scale_a_fifth_contradicts_the_square_law(judged):
    (reason,) = reasons(judged, "resnet18", 0.2, "at_sparse")
    assert reason == "resnet18 at r = 0.2 counts 0.021 GMACs, not 0.13: cost goes with r squared: 96 % less than dense, not 76 %"
    (reason,) = reasons(judged, "resnet18", 0.2, "advmoe")
    assert "with experts at r = 0.2 counts 0.029 GMACs, not 0.14" in reason


def test_wide_resnets_routers_contradict_each_other(judged):
    for scale in (0.2, 0.5, 0.8):
        count, router = reasons(judged, "wrn28_10", scale, "at_moe")
        assert "counts" in count
        assert "routers of 0.73 at r = 0.2, 0.44 at r = 0.5, 1.21 at r = 0.8" in router


def test_wrong_division_and_dense_count(judged):
    assert reasons(judged, "wrn28_10", 0.8, "at_small_dense") == ("3.36 is 36 % less than 5.25, not 38 %",)
    assert reasons(judged, "resnet18", 1.0, "at_dense") == ("resnet18 at r = 1 counts 0.555 GMACs, not 0.54",)


def test_marks_follow_the_counts(judged, monkeypatch):
    """If the networks cost ten times as much, every cell is wrong; a corrected cell is not marked."""
    estimate = paper_costs.estimate
    monkeypatch.setattr(paper_costs, "estimate", lambda config: estimate(config)._replace(gmacs=10 * estimate(config).gmacs))
    assert all(entry.reasons for entry in judged_cells())
    monkeypatch.undo()
    right = [replace(cell, gflops=0.02, reduction=96) if cell.model_scale == 0.2 else cell for cell in paper_costs.printed_cells()]
    monkeypatch.setattr(paper_costs, "printed_cells", lambda: tuple(right))
    small = [entry for entry in judged_cells() if (entry.cell.model, entry.cell.model_scale) == ("resnet18", 0.2)]
    assert not any(entry.reasons for entry in small if entry.cell.method in paper_costs.PLAIN)


def test_lines_number_each_reason_once(judged):
    lines = judged_lines(judged)
    notes = [line for line in lines if line.startswith("[")]
    assert len(notes) == len(set(notes)) == len({reason for entry in judged for reason in entry.reasons})
    rows = lines[1 : len(judged) + 1]
    assert [bool(re.search(r"\[\d+\]", row)) for row in rows] == [bool(entry.reasons) for entry in judged]
    assert "1%" in next(line for line in lines if "cannot be right" in line)


def test_rows_have_the_printed_and_the_counted_costs(judged):
    row = next(row for row in judged_rows(judged) if row["recipe"] == "cifar10-wrn28_10-advmoe-steps10")
    assert (row["gflops"], row["reduction"], row["ra"], row["possible"]) == (1.75, 67, 56.13, False)
    assert row["gmacs_counted"] == pytest.approx(1.311, abs=5e-4)
    assert row["reduction_counted"] == pytest.approx(75, abs=0.05)
    assert len(row["reasons"]) == 2

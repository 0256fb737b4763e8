"""Means and deviations over seeds."""

import pytest
from records import record

from advmoe.evaluation.evaluate import wilson
from advmoe.reports.cells import by_setting, span, summarise, worst_name


def runs(*worsts, **more):
    return [record(seed=seed, ra_worst=worst, **more) for seed, worst in enumerate(worsts)]


def test_mean_and_sample_deviation_by_hand():
    (summary,) = summarise(runs(30.0, 32.0, 37.0))
    worst = summary.figures["ra_worst"]
    assert (summary.n, summary.seeds) == (3, (0, 1, 2))
    assert (worst.mean, worst.n, worst.values) == (33.0, 3, (30.0, 32.0, 37.0))
    assert worst.std == pytest.approx(((9 + 1 + 16) / 2) ** 0.5)


def test_one_run_has_no_deviation():
    (summary,) = summarise(runs(30.0))
    assert summary.figures["ra_worst"].std is None
    assert summary.figures["ra_worst"].mean == 30.0


def test_figures_are_over_the_runs_that_measured_them():
    quick = record(seed=1, ra_worst=..., ra_aa=..., ra_worst_quick=40.0)
    (summary,) = summarise([record(ra_worst=30.0), quick])
    assert {name: summary.figures[name].n for name in ("ra_worst", "ra_worst_quick", "ra_aa", "sa", "gmacs")} == {
        "ra_worst": 1, "ra_worst_quick": 1, "ra_aa": 1, "sa": 2, "gmacs": 2,
    }  # fmt: skip
    assert "ra_50" not in summarise([record(ra={"10": 5.0})])[0].figures


def test_cells_and_settings_are_kept_apart():
    found = summarise([record(), record(model_scale=0.2), record("at_dense"), record(num_experts=4), record(test_pictures=200)])
    assert [own.n for own in found] == [1] * 5
    assert [len(group) for group in by_setting(found).values()] == [4, 1]


def test_unreliable_autoattack_is_known():
    assert summarise([record()])[0].unreliable  # the made-up check 5 fails
    trusted = {**record()["evaluation"], "checks": []}
    assert not summarise([record(evaluation=trusted)])[0].unreliable


def test_span_holds_the_pictures_interval_and_two_deviations():
    (narrow,), (wide,) = summarise(runs(50.0, 50.0)), summarise(runs(30.0, 50.0, 70.0))
    assert span(narrow, "ra_worst") == wilson(0.5, 300)
    assert span(wide, "ra_worst") == pytest.approx((10.0, 90.0))


def test_a_full_worst_case_goes_before_a_quick_one():
    quick = summarise([record("at_dense", ra_worst=..., ra_worst_quick=40.0)])
    assert worst_name(quick) == "ra_worst_quick"
    assert worst_name([*quick, *summarise([record()])]) == "ra_worst"

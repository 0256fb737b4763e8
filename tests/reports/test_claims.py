"""The appendix's claims judged, and the verdict."""

import pytest
from records import ROBUST, record
from test_paper_tables import paper_run

from advmoe.reports.claims import judge, verdict

METHODS = [method for method in ROBUST if method != "standard"]


def runs(seeds=(0, 1), **figures):
    """Every method's runs on 10,000 test pictures; `figures`: method -> its RA (PGD-50) and SA."""
    return [
        record(method, seed, test_pictures=10_000, ra={"50": value + 0.1 * seed}, sa=value + 0.1 * seed, ra_worst=value - 2)
        for method, value in figures.items()
        for seed in seeds
    ]


def ours(claims, figure):
    """The claim about `figure` in our setting."""
    return next(claim for claim in claims if f"in {figure}" in claim.text and "in our setting" in claim.text)


def test_clearly_ahead_of_every_baseline_is_support():
    claims = judge(runs(at_dense=50.0, at_small_dense=46.0, at_sparse=45.0, at_moe=43.0, advmoe=56.0))
    assert ours(claims, "RA (PGD-50)").verdict == ours(claims, "SA").verdict == "supported"
    assert "fashion-mnist" in ours(claims, "SA").text


def test_one_baseline_clearly_ahead_contradicts():
    claims = judge(runs(at_dense=50.0, at_small_dense=46.0, at_sparse=60.0, at_moe=43.0, advmoe=56.0))
    assert ours(claims, "RA (PGD-50)").verdict == "contradicted"
    assert "AT (Sparse) 60.0" in ours(claims, "RA (PGD-50)").detail
    assert "behind" in ours(claims, "RA (PGD-50)").detail


def test_the_dense_network_is_no_baseline_of_clean_accuracy():
    claims = judge(runs(at_dense=60.0, at_small_dense=46.0, at_sparse=45.0, at_moe=43.0, advmoe=56.0))
    assert (ours(claims, "RA (PGD-50)").verdict, ours(claims, "SA").verdict) == ("contradicted", "supported")


def test_overlapping_intervals_show_nothing():
    claims = judge(runs(at_dense=50.0, at_small_dense=46.0, at_sparse=45.0, at_moe=55.5, advmoe=56.0))
    assert ours(claims, "RA (PGD-50)").verdict == "not shown"
    assert "AT (MoE) 55.5" in ours(claims, "RA (PGD-50)").detail


def test_seeds_far_apart_show_nothing():
    """AdvMoE's mean is 6 points ahead, on many pictures, but its seeds lie 8 apart."""
    far = [
        record(method, seed, test_pictures=10_000, ra={"50": 50.0 + 8 * seed + 6 * (method == "advmoe")})
        for method in METHODS
        for seed in (0, 1)
    ]
    assert ours(judge(far), "RA (PGD-50)").verdict == "not shown"


def test_few_pictures_show_nothing():
    whole = runs(at_dense=50.0, at_small_dense=46.0, at_sparse=45.0, at_moe=43.0, advmoe=56.0)
    few = [one | {"test_pictures": 50} for one in whole]
    assert ours(judge(few), "RA (PGD-50)").verdict == "not shown"


def test_a_missing_baseline_is_no_support():
    claims = judge(runs(at_dense=50.0, at_small_dense=46.0, at_moe=43.0, advmoe=56.0))
    assert ours(claims, "RA (PGD-50)").verdict == "not shown"
    assert "AT (Sparse) not run" in ours(claims, "RA (PGD-50)").detail


def test_other_scales_and_settings_are_no_baselines():
    """Far ahead, but at another model scale or on other pictures."""
    others = [record("at_small_dense", model_scale=0.8, test_pictures=10_000, ra={"50": 90.0})]
    others += [record("at_sparse", dataset="other", test_pictures=10_000, ra={"50": 90.0})]
    claims = judge([*runs(at_dense=50.0, at_moe=43.0, advmoe=56.0), *others])
    assert ours(claims, "RA (PGD-50)").verdict == "not shown"
    assert "90.0" not in ours(claims, "RA (PGD-50)").detail


def test_without_runs_of_the_papers_setting_nothing_is_said_of_it():
    for records in ([], runs(at_dense=50.0, at_small_dense=46.0, at_sparse=45.0, at_moe=43.0, advmoe=56.0)):
        first, second = judge(records)[:2]
        assert "in the paper's setting" in first.text
        assert (first.verdict, second.verdict) == ("not shown", "not shown")
        assert first.detail.startswith("No AdvMoE run.")
    assert "AT (S-Dense) 79.93 against 79.62 (table A1, resnet18, r 0.5)" in second.detail


def test_runs_of_the_papers_setting_are_judged_as_such():
    values = {"at_dense": 50.0, "at_small_dense": 46.0, "at_sparse": 45.0, "at_moe": 43.0, "advmoe": 56.0}
    claims = judge([paper_run(f"cifar10-resnet18-{method}", ra={"50": value}) for method, value in values.items()])
    assert (claims[0].verdict, "in the paper's setting" in claims[0].text) == ("supported", True)
    assert not any("in our setting" in claim.text for claim in claims)


def history(*levels):
    """100 epochs of held-out RA, ten of each level."""
    return [{"epoch": number + 1, "val_ra": levels[number // 10], "val_sa": 80.0} for number in range(100)]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [((48.0, 48.9), "supported"), ((40.0, 44.0), "contradicted"), ((50.0, 45.0), "supported")],
)
def test_convergence_is_judged_by_the_last_tenth(ends, expected):
    run = record(epochs=100, history=history(*[20.0] * 8, *ends))
    (claim,) = [claim for claim in judge([run]) if "converges" in claim.text]
    assert claim.verdict == expected
    assert f"{ends[1] - ends[0]:+.1f}" in claim.detail


def test_runs_that_disagree_show_no_convergence():
    ends = ((48.0, 48.5), (40.0, 44.0))
    runs = [record(seed=seed, epochs=100, history=history(*[20.0] * 8, *end)) for seed, end in enumerate(ends)]
    assert next(claim for claim in judge(runs) if "converges" in claim.text).verdict == "not shown"


@pytest.mark.parametrize("run", [record(), record(epochs=100, history=[]), record("at_moe", epochs=100)])
def test_other_runs_say_nothing_of_convergence(run):
    (claim,) = [claim for claim in judge([run]) if "converges" in claim.text]
    assert claim.verdict == "not shown"


def test_different_batches_cannot_be_shown():
    claim = judge(runs(advmoe=50.0))[-1]
    assert (claim.text, claim.verdict) == ("Different batches for the two levels help", "not shown")
    assert claim.detail.startswith("No run")


def test_verdict_says_who_how_robust_and_at_what_cost():
    first, *_ = verdict(runs(at_dense=50.0, at_small_dense=46.0, advmoe=56.0))
    assert "most robust at worst is AdvMoE, r 0.5, N 2, RA-worst 54.0 ± 0.0 % (2 seeds)" in first
    assert "at 25 % of the dense network's cost (0.0100 GMACs)" in first
    assert "next is AT (Dense) with 48.0 %; all others lie clearly below" in first


def test_verdict_says_what_is_not_apart():
    (first, *_) = verdict(runs(at_dense=55.5, at_small_dense=46.0, advmoe=56.0))
    assert "these runs do not tell apart from it: AT (Dense)." in first
    assert "AT (S-Dense)" not in first


def test_quick_and_full_worst_cases_are_not_ranked_together():
    quick = record("at_dense", ra_worst=..., ra_worst_quick=99.0)
    (first, *_) = verdict([record(), quick])
    assert "alone is AdvMoE" in first
    assert "Not attacked in full, so not ranked: AT (Dense)." in first
    (first, *_) = verdict([quick])
    assert "RA-worst (quick: an upper bound) 99.0 %" in first


def test_settings_with_most_methods_come_first():
    many = [record(method, test_pictures=77) for method in METHODS]
    lines = verdict([record(), *many, record("at_dense")])
    assert "77 test pictures" in lines[0]
    assert "300 test pictures" in lines[1]


def test_failed_checks_are_named_run_by_run():
    lines = verdict([record(seed=3)])
    assert lines[-1] == (
        "Failed its checks: advmoe, r 0.5, N 2, resnet18, fashion-mnist, seed 3: "
        "(5) RA-AA near RA-worst: RA-AA is 0.50 points above RA-worst."
    )
    passed = [{"number": 5, "name": "", "status": "pass", "detail": ""}]
    trusted = {**record()["evaluation"], "checks": passed}
    assert verdict([record(evaluation=trusted)])[-1] == "No run failed a check of its evaluation."

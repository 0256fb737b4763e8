"""The claims of the paper's appendix are judged by the runs."""

from dataclasses import replace

import pytest
from records import attacked, record, runs, with_settings
from test_paper_tables import paper_run

from advmoe.attacks.registry import ATTACKS
from advmoe.paper import PAPER_METHODS
from advmoe.reports.claims import judge
from advmoe.reports.run_details import run_of
from advmoe.reports.verdict import verdict


def ours(claims, figure):
    """The claim about `figure` in our setting."""
    return next(claim for claim in claims if f"in {figure}" in claim.text and "in our setting" in claim.text)


def test_a_lead_over_every_baseline_is_support():
    claims = judge(runs(at_dense=50.0, at_small_dense=46.0, at_sparse=45.0, at_moe=43.0, advmoe=56.0))
    assert ours(claims, "RA-50").verdict == ours(claims, "SA").verdict == "supported"
    assert "fashion-mnist" in ours(claims, "SA").text


def test_one_baseline_clearly_ahead_contradicts():
    claims = judge(runs(at_dense=50.0, at_small_dense=46.0, at_sparse=60.0, at_moe=43.0, advmoe=56.0))
    assert ours(claims, "RA-50").verdict == "contradicted"
    assert "AT (Sparse) 60.0" in ours(claims, "RA-50").detail
    assert "behind" in ours(claims, "RA-50").detail


def test_the_dense_network_is_no_baseline_of_clean_accuracy():
    claims = judge(runs(at_dense=60.0, at_small_dense=46.0, at_sparse=45.0, at_moe=43.0, advmoe=56.0))
    assert (ours(claims, "RA-50").verdict, ours(claims, "SA").verdict) == ("contradicted", "supported")


def test_overlapping_intervals_show_nothing():
    claims = judge(runs(at_dense=50.0, at_small_dense=46.0, at_sparse=45.0, at_moe=55.5, advmoe=56.0))
    assert ours(claims, "RA-50").verdict == "not shown"
    assert "AT (MoE) 55.5" in ours(claims, "RA-50").detail


def test_seeds_that_differ_much_show_nothing():
    """AdvMoE's mean leads by 6 points on many images, but its seeds differ by 8."""
    far = [
        record(method, seed, test_images=10_000, ra={"50": 50.0 + 8 * seed + 6 * (method == "advmoe")})
        for method in PAPER_METHODS
        for seed in (0, 1)
    ]
    assert ours(judge(far), "RA-50").verdict == "not shown"


def test_few_images_show_nothing():
    all_runs = runs(at_dense=50.0, at_small_dense=46.0, at_sparse=45.0, at_moe=43.0, advmoe=56.0)
    few = [run.model_copy(update={"test_images": 50}) for run in all_runs]
    assert ours(judge(few), "RA-50").verdict == "not shown"


def test_a_missing_baseline_is_no_support():
    claims = judge(runs(at_dense=50.0, at_small_dense=46.0, at_moe=43.0, advmoe=56.0))
    assert ours(claims, "RA-50").verdict == "not shown"
    assert "AT (Sparse) not run" in ours(claims, "RA-50").detail


def test_other_scales_and_settings_are_no_baselines():
    """Far ahead, but at another model scale or on other images."""
    others = [record("at_small_dense", model_scale=0.8, test_images=10_000, ra={"50": 90.0})]
    others += [record("at_sparse", dataset="other", test_images=10_000, ra={"50": 90.0})]
    claims = judge([*runs(at_dense=50.0, at_moe=43.0, advmoe=56.0), *others])
    assert ours(claims, "RA-50").verdict == "not shown"
    assert "90.0" not in ours(claims, "RA-50").detail


def test_without_runs_of_the_papers_setting_its_claims_are_not_shown():
    for records in ([], runs(at_dense=50.0, at_small_dense=46.0, at_sparse=45.0, at_moe=43.0, advmoe=56.0)):
        first, second = (claim for claim in judge(records) if "in the paper's setting" in claim.text)
        assert (first.verdict, second.verdict) == ("not shown", "not shown")
        assert first.detail.startswith("No AdvMoE run.")
    assert "AT (S-Dense) 79.93 against 79.62 (table A1, resnet18, r 0.5)" in second.detail


def test_runs_of_the_papers_setting_are_judged_as_such():
    values = {"at_dense": 50.0, "at_small_dense": 46.0, "at_sparse": 45.0, "at_moe": 43.0, "advmoe": 56.0}
    claims = judge([
        paper_run(f"cifar10-resnet18-{method}", seed, ra={"50": value + 0.1 * seed})
        for method, value in values.items() for seed in (0, 1)
    ])  # fmt: skip
    assert (claims[1].verdict, "in the paper's setting" in claims[1].text) == ("supported", True)
    assert not any("in our setting" in claim.text for claim in claims)


def history(*levels):
    """100 epochs of held-out RA, ten of each level."""
    return [{"epoch": number + 1, "phase": 1, "val_ra": levels[number // 10], "val_sa": 80.0} for number in range(100)]


def convergence(*runs):
    return next(claim for claim in judge(runs) if "converges" in claim.text)


def two_seeds(*levels):
    return [record(seed=seed, epochs=100, history=history(*levels)) for seed in (0, 1)]


@pytest.mark.parametrize(
    ("ends", "expected", "state"),
    [
        ((48.0, 48.9), "supported", "48.9 %, +0.9: converged"),
        ((48.0, 47.1), "supported", "47.1 %, -0.9: converged"),
        ((40.0, 44.0), "contradicted", "44.0 %, +4.0: still rises"),
        ((60.0, 45.0), "contradicted", "45.0 %, -15.0: falls: robust overfitting;"),
        ((60.0, 5.0), "contradicted", "5.0 %, -55.0: falls: robust overfitting, to no more than chance (25.0 %)"),
        ((0.0, 0.0), "contradicted", "0.0 %, +0.0: not above chance (25.0 %)"),
        ((25.0, 25.0), "contradicted", "25.0 %, +0.0: not above chance (25.0 %)"),
    ],
)
def test_convergence_is_judged_by_the_last_tenth(ends, expected, state):
    claim = convergence(*two_seeds(*[20.0] * 8, *ends))
    assert claim.verdict == expected
    assert state in claim.detail


def test_one_seed_shows_no_convergence():
    claim = convergence(two_seeds(*[48.0] * 10)[0])
    assert (claim.verdict, claim.detail.startswith("One seed.")) == ("not shown", True)


def test_the_control_says_nothing_of_convergence():
    runs = [record(seed=seed, num_experts=1, epochs=100, history=history(*[48.0] * 10)) for seed in (0, 1)]
    assert convergence(*runs).detail.startswith("No AdvMoE run")


def test_runs_that_disagree_show_no_convergence():
    ends = ((48.0, 48.5), (40.0, 44.0))
    runs = [record(seed=seed, epochs=100, history=history(*[20.0] * 8, *end)) for seed, end in enumerate(ends)]
    assert convergence(*runs).verdict == "not shown"


@pytest.mark.parametrize("run", [record(), record(epochs=100, history=[]), record("at_moe", epochs=100)])
def test_other_runs_say_nothing_of_convergence(run):
    assert convergence(run).verdict == "not shown"


def batches(claims):
    (claim,) = (claim for claim in claims if claim.text.startswith("Different batches for the two levels help"))
    return claim


def test_different_batches_show_nothing_without_a_counterpart():
    claim = batches(judge(runs(advmoe=50.0)))
    assert (claim.verdict, claim.detail) == ("not shown", "No counterpart was run: AdvMoE with --level-batches same.")


@pytest.mark.parametrize(("worst", "expected"), [(45.0, "supported"), (55.0, "contradicted"), (49.5, "not shown")])
def test_different_batches_are_judged_against_the_same_batches(worst, expected):
    same = [
        with_settings(record(seed=seed, test_images=10_000, ra_worst=worst), "training", level_batches="same") for seed in (0, 1)
    ]
    claims = judge([*runs(at_small_dense=46.0, advmoe=52.0), *same])
    assert batches(claims).verdict == expected
    assert "AdvMoE, r 0.5, N 2: RA-worst 50.0 (" in batches(claims).detail
    assert f", the same batches {worst:.1f} (" in batches(claims).detail
    assert ours(claims, "SA").detail.count("AdvMoE") == 1  # the other claims are about the paper's method


def test_the_same_batches_with_other_settings_show_nothing():
    same = [
        with_settings(record(seed=seed, test_images=10_000, ra_worst=45.0), "training", level_batches="same", lr=0.01)
        for seed in (0, 1)
    ]
    different = runs(advmoe=52.0)
    for run in (*different, *same):
        run.evaluation.flags = "10"
    claim = batches(judge([*different, *same]))
    assert claim.verdict == "not shown"
    assert "not comparable (training.lr: 0.01, not " in claim.detail
    assert "Difference on the same images" not in claim.detail


def test_advmoe_with_only_the_same_batches_makes_no_claim_against_the_baselines():
    same = with_settings(record(test_images=10_000), "training", level_batches="same")
    assert not any("in our setting" in claim.text for claim in judge([same, *runs(at_small_dense=46.0)]))


def test_one_seed_claims_no_order():
    all_runs = runs((0,), at_dense=50.0, at_small_dense=46.0, at_sparse=45.0, at_moe=43.0, advmoe=90.0)
    claim = ours(judge(all_runs), "RA-50")
    assert (claim.verdict, "AT (Dense) 50.0 (one seed), AT" in claim.detail) == ("not shown", True)
    first = str(verdict(all_runs)[0])
    assert "One seed each, so not ranked by RA-worst: " in first
    assert not any(word in first for word in ("most robust", "Next is", "learly below"))
    one_more = runs((1,), at_dense=50.0, advmoe=90.0)
    first = str(verdict([*all_runs, *one_more])[0])
    assert "AdvMoE, r 0.5, N 2 is the most robust network in the worst case." in first
    assert "One seed each, so not ranked by RA-worst: AT (S-Dense), r 0.5 (44.0 %)" in first


@pytest.mark.parametrize(
    ("section", "change", "difference"),
    [
        ("training", {"lr": 0.05}, "training.lr: 0.05, not 0.1"),
        ("training", {"momentum": 0.5}, "training.momentum: 0.5, not 0.9"),
        ("training", {"batch_size": 64}, "training.batch_size: 64, not 128"),
        (None, {"fingerprint": "f" * 64}, "fingerprint: ffffffffffff..., not 0123456789ab..."),
    ],
)
def test_runs_of_other_settings_are_no_baselines(section, change, difference):
    all_runs = runs(at_dense=50.0, at_small_dense=46.0, at_sparse=45.0, at_moe=43.0, advmoe=56.0)
    assert ours(judge(all_runs), "RA-50").verdict == "supported"
    for run in all_runs:
        if run.method == "at_dense":
            for name, value in change.items():
                setattr(getattr(run.config, section) if section else run, name, value)
    claim = ours(judge(all_runs), "RA-50")
    assert claim.verdict == "not shown"
    assert f"not comparable ({difference})" in claim.detail
    first, second, *_ = map(str, verdict(all_runs))
    assert "AT (Dense)" not in first
    assert "only one network is ranked in the worst case. AT (Dense): " in second
    assert difference.split(":")[0] in first
    assert difference.split(":")[0] in second


def test_settings_of_routers_are_not_compared_with_networks_without_routers():
    all_runs = runs(at_dense=50.0, at_small_dense=46.0, at_sparse=45.0, at_moe=43.0, advmoe=56.0)
    for run in all_runs:
        if run.method in ("at_dense", "at_small_dense", "at_sparse"):
            with_settings(run, "training", tied_share=0.5, router_lr=0.02)
    assert ours(judge(all_runs), "RA-50").verdict == "supported"


@pytest.mark.parametrize("method", ["advmoe", "at_moe"])
def test_a_claim_counts_runs_with_the_published_settings_only(method):
    all_runs = runs(at_dense=50.0, at_small_dense=46.0, at_sparse=45.0, at_moe=43.0, advmoe=56.0)
    others = [with_settings(run, "training", router_lr=0.0) for run in runs(**{method: 10.0 if method == "advmoe" else 90.0})]
    assert judge([*others, *all_runs])[1:] == judge(all_runs)[1:]  # the first is about any two networks of a pair


def test_the_same_batches_are_compared_at_the_same_tied_share():
    different, same = runs(advmoe=52.0), runs(advmoe=45.0)
    for run in (*different, *same):
        with_settings(run, "training", tied_share=0.5)
    for run in same:
        with_settings(run, "training", level_batches="same")
    assert "AdvMoE, tied share 0.5, r 0.5, N 2: RA-worst" in batches(judge([*different, *same])).detail
    for run in same:
        with_settings(run, "training", tied_share=0.25)
    assert batches(judge([*different, *same])).detail.startswith("No counterpart was run")


def control(claims):
    return [claim for claim in claims if claim.text.startswith("Choosing an expert helps")]


def routed_and_control(worst, method="at_moe", seeds=(0, 1), **fields):
    """Runs of two experts with 50 % at worst, and of one expert with `worst`, on 10,000 images."""
    figures = {2: 50.0, 1: worst}
    return [
        record(method, seed, num_experts=experts, test_images=10_000, ra_worst=figures[experts] + 0.1 * seed, **fields)
        for experts in figures
        for seed in seeds
    ]


@pytest.mark.parametrize(("worst", "expected"), [(45.0, "supported"), (55.0, "contradicted"), (49.5, "not shown")])
def test_the_choice_of_an_expert_is_judged_against_one_expert(worst, expected):
    networks = routed_and_control(worst)
    for run in networks:
        run.evaluation.flags = "10"
    (claim,) = control(judge(networks))
    assert claim.verdict == expected
    assert "Difference on the same images: +0.0 points (" in claim.detail
    assert "in fashion-mnist, resnet18" in claim.text
    assert "AT (MoE), r 0.5, N 2: RA-worst 50.0 (" in claim.detail
    assert f"the control with one expert {worst + 0.05:.1f} (" in claim.detail


def test_the_control_may_have_the_variant_of_the_routed_network():
    networks = [with_settings(network, "model", bank="disjoint") for network in routed_and_control(45.0)]
    (claim,) = control(judge(networks))
    assert claim.verdict == "supported"


def test_a_control_of_one_seed_or_of_another_scale_or_method_shows_nothing():
    (claim,) = control(judge(routed_and_control(45.0, seeds=(0,))))
    assert (claim.verdict, "45.0 (one seed)" in claim.detail) == ("not shown", True)
    apart = [*routed_and_control(45.0)[:2], *routed_and_control(45.0, "advmoe", model_scale=0.2)[2:]]
    (claim,) = control(judge(apart))
    assert (claim.verdict, claim.detail.startswith("The control with one expert was not run")) == ("not shown", True)


def test_one_expert_of_at_moe_is_advmoes_control_unless_there_is_one_of_advmoe():
    routed, at_moe, single = (
        routed_and_control(45.0, "advmoe")[:2],
        routed_and_control(45.0)[2:],
        routed_and_control(55.0, "advmoe")[2:],
    )
    (claim,) = control(judge([*routed, *at_moe]))
    assert (claim.verdict, "AdvMoE, r 0.5, N 2" in claim.detail) == ("supported", True)
    (claim,) = control(judge([*routed, *at_moe, *single]))
    assert claim.verdict == "contradicted"


def test_a_control_under_other_attacks_shows_nothing():
    runs = routed_and_control(45.0)
    (claim,) = control(judge([*runs[:2], *(attacked(run, "pgd_10") for run in runs[2:])]))
    assert (claim.verdict, "were attacked differently" in claim.detail) == ("not shown", True)


def test_a_control_is_no_advmoe_run():
    claim = ours(
        judge(
            [
                *runs(at_dense=50.0, at_small_dense=46.0, at_sparse=45.0, at_moe=43.0, advmoe=56.0),
                *routed_and_control(45.0, "advmoe")[2:],
            ]
        ),
        "SA",
    )
    assert "N 1" not in claim.detail


def test_figures_of_an_older_version_of_an_attack_are_not_compared(monkeypatch):
    all_runs = runs(at_dense=50.0, at_small_dense=46.0, at_sparse=45.0, at_moe=43.0, advmoe=56.0)
    pgd = ATTACKS["pgd_50"]
    monkeypatch.setitem(ATTACKS, "pgd_50", replace(pgd, version=pgd.version + 1))
    assert ours(judge(all_runs), "RA-50").verdict == "supported"  # all of the same, older one
    for run in all_runs:
        if run.method != "at_dense":
            run.evaluation.attacks["pgd_50"].version = pgd.version + 1
    claim, older = ours(judge(all_runs), "RA-50"), f"by an older version of pgd_50 ({pgd.version})"
    assert claim.verdict == "not shown"
    assert f"not comparable (evaluated {older}, the other by the present version of every attack)" in claim.detail
    assert ours(judge(all_runs), "SA").verdict == "supported"  # no attack changes it
    assert dict(run_of(all_runs[0]).provenance)["evaluated"] == f"{older}: not compared with newer evaluations"
    assert dict(run_of(all_runs[-1]).provenance)["evaluated"] == "by the present version of every attack"

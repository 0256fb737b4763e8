"""Means and deviations over seeds."""

import pytest
from records import content, record, with_settings

from advmoe.attacks.presets import PRESETS
from advmoe.evaluation.results import wilson
from advmoe.reports.summaries import attacks_in_words, by_setting, comparable_groups, interval, student_t, summarise, worst_name


def runs(*worsts, **more):
    return [record(seed=seed, ra_worst=worst, **more) for seed, worst in enumerate(worsts)]


def attacked(*attacks, left_out=(), **more):
    """A Record whose worst case is over these attacks; "quick" stands for those of the preset."""
    names = PRESETS["quick"].attacks if attacks == ("quick",) else attacks
    run = {name: {"attacked": 1, "broken": 0, "seconds": 1.0} for name in names}
    base = content(**more)
    return record(**more, evaluation=base["evaluation"] | {"attacks": run, "left_out": dict.fromkeys(left_out, "why")})


def quick(*attacks, **more):
    return attacked(*(attacks or ["quick"]), ra_worst=..., ra_worst_quick=40.0, **more)


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
    (summary,) = summarise([record(ra_worst=30.0), quick(seed=1, ra_aa=...)])
    assert {name: summary.figures[name].n for name in ("ra_worst", "ra_worst_quick", "ra_aa", "sa", "gmacs")} == {
        "ra_worst": 1, "ra_worst_quick": 1, "ra_aa": 1, "sa": 2, "gmacs": 2,
    }  # fmt: skip
    assert "ra_50" not in summarise([record(ra={"10": 5.0})])[0].figures


def test_cells_and_settings_are_separated():
    summaries = summarise([record(), record(model_scale=0.2), record("at_dense"), record(num_experts=4), record(test_images=200)])
    assert [summary.n for summary in summaries] == [1] * 5
    assert [len(group) for group in by_setting(summaries).values()] == [4, 1]


def test_unreliable_autoattack_is_known():
    assert summarise([record()])[0].unreliable  # check 5 of the invented Record fails
    trusted = {**content()["evaluation"], "checks": []}
    assert not summarise([record(evaluation=trusted)])[0].unreliable


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [
        (1, 12.706204736), (2, 4.302652730), (3, 3.182446305), (4, 2.776445105), (9, 2.262157163), (29, 2.045229642),
        (30, 2.042272456),
    ],
)  # fmt: skip
def test_student_t_is_the_published_quantile(degrees, quantile):
    assert student_t(degrees) == pytest.approx(quantile, abs=5e-4)


def test_student_t_is_never_too_narrow():
    quantiles = [student_t(degrees) for degrees in range(1, 100)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert student_t(1000) >= 1.962339081


def test_span_covers_the_interval_over_images_and_that_over_seeds():
    (equal,), (three,), (two,) = summarise(runs(50.0, 50.0)), summarise(runs(40.0, 50.0, 60.0)), summarise(runs(49.0, 51.0))
    assert interval(equal, "ra_worst") == wilson(0.5, 300)
    margin = 4.303 * 10 / 3**0.5
    assert interval(three, "ra_worst") == pytest.approx((50 - margin, 50 + margin))
    assert interval(two, "ra_worst") == pytest.approx((50 - 12.706, 50 + 12.706))
    (single,) = summarise(runs(50.0))
    assert interval(single, "ra_worst") == wilson(0.5, 300)
    (low,), (high,) = summarise(runs(4.0, 9.0)), summarise(runs(91.0, 96.0))
    assert interval(low, "ra_worst")[0] == 0
    assert interval(high, "ra_worst")[1] == 100


def test_a_full_worst_case_goes_before_a_quick_one():
    few, listed = summarise([quick(method="at_dense")]), summarise([quick("pgd_10", method="at_dense")])
    assert worst_name(few) == "ra_worst_quick"
    assert worst_name([*few, *summarise([record()])]) == "ra_worst"
    assert worst_name(listed) == "ra_worst_listed"
    assert worst_name([*listed, *few]) == "ra_worst_quick"


def test_the_worst_case_that_most_networks_have_goes_first():
    """One network that AutoAttack attacked does not take the figures of all others out of the comparison."""
    several = [summary for scale in (0.2, 0.5) for summary in summarise([quick(seed=seed, model_scale=scale) for seed in range(2)])]
    assert worst_name([*several, *summarise([record(method="at_moe")])]) == "ra_worst_quick"
    assert worst_name([*several[:1], *summarise([record(method="at_moe", seed=seed) for seed in range(2)])]) == "ra_worst"


def test_a_list_of_attacks_does_not_get_the_name_of_the_preset():
    (summary,) = summarise([quick("pgd_10")])
    assert "ra_worst_quick" not in summary.figures
    assert summary.figures["ra_worst_listed"].mean == 40.0
    assert summary.attacks == {"ra_worst_listed": {"pgd_10"}}


@pytest.mark.parametrize("full", [False, True])
def test_seeds_attacked_differently_have_no_common_worst_case(full):
    name = "ra_worst" if full else "ra_worst_listed"
    (summary,) = summarise([(attacked if full else quick)(attack, seed=seed) for seed, attack in enumerate(["pgd_10", "pgd_50"])])
    assert (name in summary.figures, summary.mixed, summary.attacks) == (False, (name,), {})
    assert summary.figures["sa"].n == 2


def test_a_network_without_routers_is_attacked_by_the_same_preset():
    routing = ("straight_through_margin", "reroute_quick")
    rest = [name for name in PRESETS["quick"].attacks if name not in routing]
    (dense,), (routed,) = summarise([quick(*rest, method="at_dense", left_out=routing)]), summarise([quick()])
    assert dense.attacks == routed.attacks
    (fewer,) = summarise([quick(*rest)])
    assert fewer.attacks.keys() == {"ra_worst_listed"}


def test_attacks_are_named_by_their_preset():
    standard = frozenset(PRESETS["standard"].attacks)
    assert attacks_in_words(standard) == "the preset standard"
    assert attacks_in_words(standard - {"transfer"}) == "the preset standard without transfer"
    few_classes = standard - {"aa_apgd-t"} | {"apgd_t"}
    assert attacks_in_words(few_classes) == "the preset standard for few classes"
    assert attacks_in_words(few_classes - {"transfer"}) == "the preset standard for few classes without transfer"
    full = frozenset(PRESETS["full"].attacks) - {"aa_apgd-t", "aaplus_apgd-t"} | {"apgd_t_plus"}
    for other in (full, full - {"aaplus_apgd-dlr"} | {"apgd_dlr_plus"}):  # three classes and two
        assert attacks_in_words(other) == "the preset full for few classes"
    assert attacks_in_words(frozenset({"pgd_50", "pgd_10"})) == "pgd_10, pgd_50"
    assert attacks_in_words(frozenset()) == "attacks that are not in the Record"


def test_alike_groups_runs_that_differ_only_in_their_method():
    tied, slow, other = record(), record("at_dense"), record("at_moe", fingerprint="f" * 64)
    with_settings(tied, "training", tied_share=0.5, router_lr=0.3)
    with_settings(slow, "training", lr=0.05)
    summaries = summarise([tied, slow, other, record("at_sparse"), record(model_scale=0.2)])
    assert [[summary.cell.method for summary in group] for group in comparable_groups(summaries)] == [
        ["advmoe", "at_sparse", "advmoe"],
        ["at_dense"],
        ["at_moe"],
    ]

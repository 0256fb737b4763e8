"""The verdict names the most robust networks, those that are not ranked, and failed checks."""

from dataclasses import replace

from records import ROBUST, attacked, content, record, runs, with_settings

from advmoe.attacks.presets import PRESETS
from advmoe.attacks.registry import ATTACKS
from advmoe.evaluation.record_evaluation import Difference
from advmoe.reports import verdict as module
from advmoe.reports.cell import cell_of
from advmoe.reports.choice import MAX_LISTED, Against
from advmoe.reports.markup import Statement
from advmoe.reports.verdict import check_lines


def verdict(records):
    """The statements as text."""
    return [str(statement) for statement in module.verdict(records)]


def test_verdict_names_the_most_robust_network_and_its_cost():
    first, *_ = module.verdict(runs(at_dense=50.0, at_small_dense=46.0, advmoe=56.0))
    assert first.answer == "On fashion-mnist, AdvMoE, r 0.5, N 2 is the most robust network in the worst case."
    assert first.figures.startswith(
        "RA-worst 54.0 ± 0.0 % (2 seeds) at 25 % of the dense network's cost (0.0100 GMACs). Next is AT"
    )
    assert "Next is AT (Dense) (48.0 %); all others are clearly below (95 % intervals" in first.figures


def test_verdict_names_what_is_not_clearly_below():
    (first, *_) = module.verdict(runs(at_dense=55.5, at_small_dense=46.0, advmoe=56.0))
    assert first.answer == "On fashion-mnist, no network is clearly the most robust in the worst case."
    highest = "Of the networks with several seeds, AdvMoE, r 0.5, N 2 has the highest mean: RA-worst 54.0 ± 0.0 % (2 seeds)"
    assert first.figures.startswith(highest)
    assert "Not clearly below it (95 % intervals over seeds and over images): AT (Dense) (53.5 %)." in first.figures
    assert "AT (S-Dense)" not in first.figures


def test_one_epoch_is_singular():
    assert "(width 16), 1 epoch on 1960 images" in verdict([record(epochs=1)])[0]


def test_quick_and_full_worst_cases_are_not_ranked_together():
    quick = record("at_dense", ra_worst=..., ra_worst_quick=99.0)
    (first, *_) = verdict([record(), record(seed=1), quick])
    assert "only one network is ranked in the worst case. AdvMoE" in first
    assert (
        "Not ranked, because AutoAttack or an attack on the routing is missing (advmoe evaluate --standard): AT (Dense)." in first
    )
    (first, *_) = verdict([attacked(quick, *PRESETS["quick"].attacks)])
    assert "One seed each, so not ranked by RA-worst (quick), an upper bound: AT (Dense) (99.0 %)." in first
    (first, *_) = verdict([quick])
    assert "no network is ranked in the worst case. One seed each, so not ranked by RA-worst (listed attacks), an upper" in first


def test_of_many_networks_with_one_seed_only_the_highest_are_named():
    first, *_ = module.verdict([record("at_small_dense", model_scale=scale) for scale in (0.2, 0.4, 0.6, 0.8, 0.9)])
    highest = "AT (S-Dense), r 0.9 (50.0 %); AT (S-Dense), r 0.8 (49.0 %); AT (S-Dense), r 0.6 (47.0 %); and 2 more."
    assert f"One seed each, so not ranked by RA-worst: {highest}" in first.figures


def test_runs_under_other_attacks_are_not_ranked_together():
    all_runs = runs(at_dense=50.0, at_sparse=45.0, advmoe=56.0)
    other = [attacked(run, "pgd_10") if run.method == "at_dense" else run for run in all_runs]
    (first, *_) = verdict(other)
    assert "Next is AT (Sparse)" in first
    assert "Not ranked, because not attacked by pgd_50: AT (Dense)." in first
    mixed = [attacked(run, "pgd_10") if (run.method, run.seed) == ("at_dense", 1) else run for run in all_runs]
    (first, *_) = verdict(mixed)
    assert "Not ranked, because their seeds were attacked differently: AT (Dense)." in first
    (first, *_) = verdict([run for run in mixed if run.method == "at_dense"])
    assert "no network is ranked in the worst case. Not ranked, because their seeds were attacked" in first


def test_verdict_says_whether_choosing_an_expert_helps():
    pair = [record("advmoe", seed) for seed in (0, 1)], [record("at_moe", seed, num_experts=1) for seed in (0, 1)]
    for networks, flags in zip(pair, ("1100", "1000"), strict=True):
        for network in networks:
            network.evaluation.flags = flags
    lines = verdict([*pair[0], *pair[1]])
    (answer,) = [line for line in lines if line.startswith("Does choosing an expert help?")]
    assert "help? Not shown. RA-worst minus that of the control with one expert, on the same images" in answer
    assert "AdvMoE, r 0.5, N 2: +25.0 points (" in answer
    assert answer.endswith(
        "), 2 seeds. By the intervals over seeds and images, no network is clearly below its control, and not all are "
        "clearly above it."
    )
    assert not any("choosing an expert" in line for line in verdict(pair[0]))
    others = verdict([*pair[0], *pair[1], record(dataset="other")])
    (answer,) = [line for line in others if line.startswith("Does choosing an expert help? On fashion-mnist: Not shown.")]
    assert "), 2 seeds. By the intervals over seeds and images," in answer
    shorter = record("advmoe", epochs=1), record("at_moe", num_experts=1, epochs=1)
    for network in shorter:
        network.evaluation.flags = "1100"
    answers = [line for line in verdict([*pair[0], *pair[1], *shorter]) if "choosing an expert" in line]
    assert [", 1 epoch on" in answer for answer in answers] in ([True, False], [False, True])
    (answer,) = [line for line in verdict([*pair[0], pair[1][0], attacked(pair[1][1], "pgd_10")]) if "an expert help" in line]
    assert "), 1 seed. With one seed nothing follows for other seeds." in answer
    for network in pair[1]:
        with_settings(network, "training", lr=0.05)
    assert not any("choosing an expert" in line for line in verdict([*pair[0], *pair[1]]))


def test_of_many_networks_only_the_highest_and_the_lowest_difference_from_the_control_are_named():
    control = record("at_moe", num_experts=1)
    control.evaluation.flags = "10" * 50
    flags = {6: "1" * 100, 7: "0" * 100, **dict.fromkeys(range(8, 8 + MAX_LISTED), "10" * 50)}
    networks = [with_settings(record("advmoe"), "training", tied_share=share / 20) for share in flags]
    for network, values in zip(networks, flags.values(), strict=True):
        network.evaluation.flags = values
    (answer,) = [line for line in verdict([control, *networks]) if line.startswith("Does choosing an expert help?")]
    assert f"seeds: of {MAX_LISTED + 2} networks, the interval is above 0 for 1 and below 0 for 1. The highest" in answer
    assert "highest of these differences is that of AdvMoE, tied share 0.3, r 0.5, N 2: +50.0 points (" in answer
    assert "The lowest is that of AdvMoE, tied share 0.35, r 0.5, N 2: -50.0 points (" in answer
    assert answer.count("AdvMoE") == 2


def test_a_gain_of_one_network_alone_is_said_as_it_is():
    lines = []
    for figures in ({"advmoe": 90.0, "at_moe": 50.5}, {"advmoe": 50.5, "at_moe": 50.5}):
        networks = [record(method, seed, ra_worst=worst + seed) for method, worst in figures.items() for seed in (0, 1)]
        controls = [record("at_moe", seed, num_experts=1, ra_worst=50.0 + seed) for seed in (0, 1)]
        for network in (*networks, *controls):
            network.evaluation.flags = "10"
        (answer,) = [line for line in verdict([*networks, *controls]) if "choosing an expert help" in line]
        lines.append(answer)
    assert all("Not shown." in line and "no network is clearly below its control, and not all are" in line for line in lines)


def test_runs_under_an_older_version_of_an_attack_have_a_sentence_that_says_so(monkeypatch):
    all_runs, pgd = runs(at_dense=50.0, at_sparse=45.0, advmoe=56.0), ATTACKS["pgd_50"]
    monkeypatch.setitem(ATTACKS, "pgd_50", replace(pgd, version=pgd.version + 1))
    for run in all_runs:
        if run.method != "at_dense":
            run.evaluation.attacks["pgd_50"].version = pgd.version + 1
    present, older, *_ = verdict(all_runs)
    assert present.startswith("On fashion-mnist, AdvMoE, r 0.5, N 2 is the most robust network")
    assert present.endswith(", evaluated by the present version of every attack.")
    assert older.startswith("On fashion-mnist, only one network is ranked in the worst case. AT (Dense): ")
    assert older.endswith(f", evaluated by an older version of pgd_50 ({pgd.version}).")


def test_settings_with_most_methods_come_first():
    many = [record(method, test_images=77) for method in ROBUST if method != "standard"]
    lines = verdict([record(), *many, record("at_dense")])
    assert "77 test images" in lines[0]
    assert "300 test images" in lines[1]


def with_checks(*checks, **fields):
    """A Record with the checks (number, name, status, detail)."""
    names = ("number", "name", "status", "detail")
    return record(
        **fields, evaluation={**content()["evaluation"], "checks": [dict(zip(names, one, strict=True)) for one in checks]}
    )


def test_warnings_and_skipped_checks_are_named():
    both = (4, "Square adds nothing", "skipped", "AutoAttack was not run"), (6, "experts are used", "warn", "1 layer collapsed")
    more = (5, "RA-AA near RA-worst", "skipped", "AutoAttack was not run"), (7, "more budget", "skipped", "not in this preset")
    runs = [with_checks(*both), with_checks(*both, *more, seed=1), with_checks((1, "", "pass", ""), seed=2)]
    assert list(map(str, check_lines(runs))) == [
        "No run failed a check of its evaluation.",
        "Check with a warning: (6) experts are used. AdvMoE, r 0.5, N 2, resnet18, fashion-mnist, seed 0; "
        "AdvMoE, r 0.5, N 2, resnet18, fashion-mnist, seed 1.",
        "Skipped checks: 1 to 3 of 5, in 2 of 3 runs. 4, 5 (AutoAttack was not run); 7 (not in this preset).",
    ]
    many = check_lines([with_checks(both[1], seed=seed) for seed in range(7)])
    assert many[1].figures.endswith("seed 2; and 4 more.")
    assert check_lines([with_checks()]) == [Statement("No check of the evaluation was made.")]


def test_failed_checks_are_named_for_each_run():
    lines = check_lines([record(seed=3)])
    assert module.verdict([record(seed=3)])[-2:] == lines
    assert lines[-1] == ("Skipped checks: 1 of 3, in 1 of 1 run.", "4 (AutoAttack was not run).")
    assert lines[0] == (
        "Failed its checks: AdvMoE, r 0.5, N 2, resnet18, fashion-mnist, seed 3.",
        "(5) RA-AA near RA-worst: RA-AA is 0.50 points above RA-worst.",
    )
    assert check_lines([record(seed=3), record(seed=3, epsilon=0.05)])[:2] == lines[:1] * 2  # two runs with one title
    passing = [{"number": 5, "name": "", "status": "pass", "detail": ""}]
    trusted = {**content()["evaluation"], "checks": passing}
    assert verdict([record(evaluation=trusted)])[-1] == "No run failed a check of its evaluation."


def test_the_table_has_every_network_with_its_cost_and_its_difference_from_the_control(monkeypatch):
    control = [record("at_moe", seed=seed, num_experts=1, ra_worst=50.0, test_images=10_000) for seed in (0, 1)]
    quick = record("at_dense", ra_worst=..., ra_worst_quick=99.0, test_images=10_000)
    routed = runs(advmoe=56.0)
    against = Against(Difference(value=4.0, low=3.0, high=5.0), 2, "RA-worst")
    monkeypatch.setattr(module, "differences_from_control", lambda _: {cell_of(routed[0]): against})
    table = module.networks_table([*runs(at_small_dense=46.0), *routed, *control, quick])
    assert [[entry.text for entry in row] for row in table.rows] == [
        ["AdvMoE, r 0.5, N 2", "54.0 ± 0.0", "53.0 to 55.0", "0.0100 (25 %)", "+4.0 (+3.0 to +5.0)", "2"],
        ["AT (MoE), r 0.5, N 1", "50.0 ± 0.0", "49.0 to 51.0", "0.0100 (25 %)", "", "2"],
        ["AT (S-Dense), r 0.5", "44.0 ± 0.0", "43.0 to 45.0", "0.0100 (25 %)", "", "2"],
        ["AT (Dense)", "not measured", "", "0.0400 (100 %)", "", "1"],  # RA-worst (quick) is not RA-worst
    ]


def test_the_table_of_networks_has_no_difference_of_another_figure(monkeypatch):
    routed = runs(advmoe=56.0)
    against = Against(Difference(value=4.0, low=3.0, high=5.0), 1, "RA-worst (quick)")
    monkeypatch.setattr(module, "differences_from_control", lambda _: {cell_of(routed[0]): against})
    assert module.networks_table(routed).rows[0][4].text == ""


def test_the_table_of_networks_counts_the_seeds_of_its_figure():
    only_quick = record(seed=2, test_images=10_000, ra_worst=..., ra_worst_quick=60.0)
    assert module.networks_table([*runs(advmoe=56.0), only_quick]).rows[0][5].text == "2"


def test_the_table_of_networks_marks_figures_of_other_attacks():
    all_runs = runs(at_dense=50.0, advmoe=56.0)
    other = [attacked(run, "pgd_10") if run.method == "at_dense" else run for run in all_runs]
    table = module.networks_table(other)
    assert table.rows[1][1].marks
    assert "pgd_10" in " ".join(table.notes)

"""What is said of the routing, and of attacks on a part of the images."""

from records import attacked, record

from advmoe.evaluation.record_evaluation import Difference
from advmoe.reports.measures import attacks_of
from advmoe.reports.model_card import model_card
from advmoe.reports.routing_facts import choice_gains, routing_bounds
from advmoe.reports.run_details import run_of
from advmoe.reports.tables import evaluation_lines


def test_the_bracket_needs_both_ends():
    advmoe = record(ra_worst=18.0)
    assert routing_bounds(advmoe) == ""
    advmoe.evaluation.figures["ra_paths_sampled"] = 15.0
    assert routing_bounds(advmoe) == ""
    advmoe.evaluation.figures["ra_paths"] = 16.0
    assert routing_bounds(advmoe) == "between 16.0 % (RA-paths) and 18.0 % (RA-worst)"
    assert (
        "accuracy under any attack on the routing: estimated between 16.0 % (RA-paths) and 18.0 % (RA-worst)"
        in evaluation_lines(advmoe)
    )


def test_the_worst_case_under_listed_attacks_is_not_called_quick():
    listed = attacked(record(ra_worst=..., ra_worst_quick=18.0), "pgd_50", "paths")
    listed.evaluation.figures = {"ra_worst_quick": 18.0, "ra_paths": 16.0}
    listed.evaluation.intervals = {"ra_worst_quick": (14.0, 23.0)}
    assert routing_bounds(listed) == "between 16.0 % (RA-paths) and 18.0 % (RA-worst (listed attacks))"
    assert evaluation_lines(listed)[0] == "RA-worst (listed attacks)  18.0 %  95 % interval 14.0 to 23.0"


def test_gains_of_the_choice_are_printed_and_shown_on_the_page():
    advmoe = record("advmoe")
    advmoe.evaluation.routing.choice_gain = [Difference(value=2.0, low=-1.3, high=5.2)]
    assert choice_gains(advmoe.evaluation) == (
        "+2.0 points (-1.3 to +5.2) over expert 0 alone, under PGD-10: probably too high, because PGD overestimates routed "
        "networks more than a fixed expert"
    )
    assert any(choice_gains(advmoe.evaluation) in line for line in evaluation_lines(advmoe))
    assert ("gain by choosing an expert", choice_gains(advmoe.evaluation)) in run_of(advmoe).facts
    advmoe.evaluation.routing.fixed_expert_ra_worst = [31.5, 12.0]
    advmoe.evaluation.routing.choice_gain_worst = [Difference(value=-1.5, low=-3, high=0.25)] * 2
    worst = "-1.5 points (-3.0 to +0.2) over expert 0 alone; -1.5 points (-3.0 to +0.2) over expert 1 alone, in the worst case"
    lines = evaluation_lines(advmoe)
    assert f"gain by choosing an expert: {worst}" in lines
    assert any(line.endswith("RA-10 20.0 20.0, worst case 31.5 12.0") for line in lines)
    assert ("gain by choosing an expert", worst) in run_of(advmoe).facts
    assert choice_gains(record("at_dense").evaluation) == ""


def test_attacks_that_were_run_on_some_shards_are_named_separately():
    advmoe = record("advmoe")
    advmoe.evaluation.partly_run = dict.fromkeys(("soft_1", "soft_5"), "1 of 4 shards")
    assert attacks_of(advmoe) - attacks_of(record("advmoe")) == {"soft_1 (1 of 4 shards)", "soft_5 (1 of 4 shards)"}
    (line,) = [line for line in evaluation_lines(advmoe) if "soft_1" in line]
    assert line.startswith("run on 1 of 4 shards only")
    assert line.endswith(": soft_1, soft_5")
    assert ("attacks on a part of the images", "soft_1 (1 of 4 shards), soft_5 (1 of 4 shards)") in run_of(advmoe).facts
    assert "`soft_1` was run on 1 of 4 shards only" in model_card(advmoe, "me/net", ["a"] * 10, (1, 28, 28))

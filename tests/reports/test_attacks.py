from records import record

from advmoe.evaluation.record_evaluation import Difference
from advmoe.reports.attacks import caught_alone, choice_gains, routing_bounds
from advmoe.reports.runs import run_of
from advmoe.reports.tables import evaluation_lines


def with_attacks(**broken):
    evaluation = record().evaluation.model_copy(deep=True)
    evaluation.broken = broken
    return evaluation


def test_an_attack_catches_alone_what_no_other_one_broke():
    assert caught_alone(with_attacks(pgd_10=[1, 2], pgd_50=[2, 3], pma=[4])) == {"pgd_10": 1, "pgd_50": 1, "pma": 1}
    assert caught_alone(with_attacks()) == {}


def test_the_bracket_needs_both_ends():
    evaluation = with_attacks()
    evaluation.figures = {"ra_worst": 18.0, "sa": 50.0}
    assert routing_bounds(evaluation) == ""
    evaluation.figures["ra_paths_sampled"] = 15.0
    assert routing_bounds(evaluation) == ""
    evaluation.figures["ra_paths"] = 16.0
    assert routing_bounds(evaluation) == "between 16.0 % (RA-paths) and 18.0 % (RA-worst)"
    assert (
        "accuracy under any attack on the routing: estimated between 16.0 % (RA-paths) and 18.0 % (RA-worst)"
        in evaluation_lines(evaluation)
    )


def test_gains_of_the_choice_are_printed_and_shown_on_the_page():
    advmoe = record("advmoe")
    advmoe.evaluation.routing.choice_gain = [Difference(value=2.0, low=-1.3, high=5.2)]
    assert choice_gains(advmoe.evaluation) == "+2.0 points (-1.3 to +5.2) over expert 0 alone"
    assert any(choice_gains(advmoe.evaluation) in line for line in evaluation_lines(advmoe.evaluation))
    assert ("gain in RA-10 by choosing an expert", choice_gains(advmoe.evaluation)) in run_of(advmoe).facts
    assert choice_gains(record("at_dense").evaluation) == ""

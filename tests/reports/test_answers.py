"""Three answers from the Records of one setting."""

import pytest
from records import record

from advmoe.reports.answers import answers, paired_difference


def test_a_difference_is_taken_image_by_image():
    difference, margin = paired_difference("11110000", "11000001")  # two gained, one lost
    assert difference == pytest.approx(12.5)
    assert margin == pytest.approx(196 * (3 - 1 / 8) ** 0.5 / 8)
    assert paired_difference("1010", "1010") == (0.0, 0.0)


def test_without_advmoe_there_is_no_answer():
    assert answers([]) == []


def test_three_questions_are_answered():
    found = [record(method) for method in ("standard", "at_dense", "at_small_dense", "advmoe")]
    robust, cost, choice = answers(found)
    assert robust.startswith("How robust? AdvMoE classifies 79.0 % of the clean test images correctly; 49.0 % stay correct")
    assert "A network without robust training: " in robust
    assert "upper bound" not in robust
    assert cost == "At what cost? 0.0100 GMACs for an image, 25 % of the dense network's. " + (
        "With the dense network 55.0 % stay correct under every attack that was run."
    )
    assert choice.startswith("Does choosing an expert help? ")
    assert "With the best single expert in every layer, " in choice
    assert "(with routers 79.0 %)" in choice


@pytest.mark.parametrize(
    ("flags", "answer"), [("11", "no significant difference"), ("10" * 50, "more robust"), ("0" * 100, "less robust")]
)
def test_advmoe_is_compared_with_a_network_of_the_same_cost(flags, answer):
    routed, small = record("advmoe"), record("at_small_dense")
    others = {"11": "11", "10" * 50: "0" * 100, "0" * 100: "10" * 50}[flags]
    routed.evaluation.flags, small.evaluation.flags = flags, others
    choice = answers([routed, small])[-1]
    assert "Does choosing an expert help? This needs a control" in choice
    assert f"({answer})." in choice


def test_what_is_not_known_is_not_answered():
    quick = record("advmoe", ra_worst=..., ra_worst_quick=44.0)
    robust, cost, *_ = answers([quick])
    assert "AutoAttack was not run, so this is an upper bound." in robust
    assert "With the dense network" not in cost

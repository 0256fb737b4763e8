"""Three answers from the Records of one setting."""

import pytest
from records import record

from advmoe.reports import answers as module


def answers(records):
    """The statements as text."""
    return [str(statement) for statement in module.answers(records)]


def test_without_advmoe_there_is_no_answer():
    assert answers([]) == []


def test_three_questions_are_answered():
    records = [record(method) for method in ("standard", "at_dense", "at_small_dense", "advmoe")]
    robust, cost, choice = answers(records)
    assert robust.startswith(
        "How robust? 49.0 % of the test images stay correct under every attack that was run. AdvMoE on fashion-mnist, seed 0, 95 %"
    )
    assert "; 79.0 % of the clean images are classified correctly." in robust
    assert "A network without robust training: " in robust
    assert "upper bound" not in robust
    assert cost == "At what cost? 0.0100 GMACs for an image, 25 % of the dense network's. " + (
        "With the dense network 55.0 % stay correct under every attack that was run."
    )
    assert choice.startswith("Does choosing an expert help? ")
    assert "With the most robust expert in every layer, " in choice
    assert "(with routers 79.0 %)" in choice
    assert "% under PGD-10. With routers it is 53.0 %; PGD-10 gives routed networks too high a figure." in choice


@pytest.mark.parametrize(
    ("flags", "others", "answer"),
    [
        ("10" * 50, "0" * 100, "Yes, in this seed. The share of images that withstand every attack changes by +50.0 points"),
        (
            "0" * 100,
            "10" * 50,
            "No, it harms in this seed. The share of images that withstand every attack changes by -50.0 points",
        ),
        ("10" * 50, "01" * 50, "Not shown. The share of images that withstand every attack changes by +0.0 points"),
    ],
)
def test_advmoe_is_compared_with_its_control_image_by_image(flags, others, answer):
    routed, control = record("advmoe"), record("at_moe", num_experts=1)
    routed.evaluation.flags, control.evaluation.flags = flags, others
    choice = answers([routed, control])[-1]
    assert choice.startswith(f"Does choosing an expert help? {answer} (")


def test_a_control_that_cannot_be_compared_is_not_called_missing():
    routed, control = record("advmoe"), record("at_moe", num_experts=1)
    routed.evaluation.flags, control.evaluation.flags = "10", "0"
    choice = answers([routed, control])[-1]
    assert choice.startswith("Does choosing an expert help? Not compared with the control with one expert: it was evaluated")


def test_the_small_dense_network_is_no_control():
    routed, small, two_experts = record("advmoe"), record("at_small_dense"), record("at_moe")
    for one in (routed, small, two_experts):
        one.evaluation.flags = "10"
    choice = answers([routed, small, two_experts])[-1]
    assert "Does choosing an expert help? The control with one expert was not run" in choice
    assert "Over the small dense network of about the same cost: +0.0 points (" in choice


def test_what_is_not_known_is_not_answered():
    quick = record("advmoe", ra_worst=..., ra_worst_quick=44.0)
    robust, cost, *_ = answers([quick])
    assert "AutoAttack was not run, so this is an upper bound." in robust
    assert "With the dense network" not in cost

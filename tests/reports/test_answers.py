"""Three answers from the Records of one setting."""

import pytest
from records import record, with_settings

from advmoe.reports import answers as module
from advmoe.reports.verdict import verdict


def answers(records):
    """The statements as text."""
    return [str(statement) for statement in module.answers(records)]


def test_without_advmoe_there_is_no_answer():
    assert answers([]) == []


@pytest.mark.parametrize("tied_share", [0.0, 0.67])
def test_robustness_and_cost_are_answered(tied_share):
    methods = ("standard", "at_dense", "at_small_dense", "advmoe")
    robust, cost = answers([with_settings(record(method), "training", tied_share=tied_share) for method in methods])
    assert robust.startswith(
        "How robust? 49.0 % of the test images stay correct under every attack that was run. AdvMoE on fashion-mnist, seed 0, 95 %"
    )
    assert "; 79.0 % of the clean images are classified correctly." in robust
    assert "A network without robust training: " in robust
    assert "upper bound" not in robust
    assert cost == "At what cost? 0.0100 GMACs for an image, 25 % of the dense network's. " + (
        "For comparison, the share that stays correct: the dense network 55.0 %, the small dense network of about the same cost "
        "46.0 %."
    )


@pytest.mark.parametrize(("flags", "others"), [("10" * 50, "0" * 100), ("0" * 100, "10" * 50), ("10" * 50, "01" * 50)])
def test_whether_choosing_an_expert_helps_is_answered_as_in_the_verdict(flags, others):
    routed, control = record("advmoe"), record("at_moe", num_experts=1)
    routed.evaluation.flags, control.evaluation.flags = flags, others
    *_, choice = answers([routed, control])
    assert choice.startswith("Does choosing an expert help? Not shown. ")  # one seed, however clear
    assert choice in map(str, verdict([routed, control]))


def test_what_is_not_known_is_not_answered():
    quick = record("advmoe", ra_worst=..., ra_worst_quick=44.0)
    robust, cost = answers([quick])
    assert "AutoAttack was not run, so this is an upper bound." in robust
    assert cost.endswith("% of the dense network's.")

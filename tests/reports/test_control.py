import pytest
from records import attacked, record

from advmoe.reports.control import comparison_line, worst_case_difference


def with_flags(flags, **fields):
    result = record(**fields)
    result.evaluation.flags = flags
    return result


def test_a_network_is_compared_with_its_control_image_by_image():
    pair = with_flags("1110" * 25), with_flags("1011" * 25, run="one-expert")
    assert worst_case_difference([pair]).value == 0
    assert worst_case_difference([]) is None
    ahead = with_flags("1" * 60 + "0" * 40), with_flags("1" * 30 + "0" * 70, run="one-expert")
    line = comparison_line(*ahead)
    assert "minus that of one-expert, on the same images: +30.0 points (" in line
    assert ": this trained network is more robust than that one. The interval is over images, not seeds: " in line
    assert line.endswith("it compares the two networks, not their methods")
    assert "this trained network is less robust than that one" in comparison_line(*reversed(ahead))
    assert "this trained network is not apart from that one" in comparison_line(*pair)
    assert "evaluated on other images" in comparison_line(ahead[0], with_flags("1"))
    assert "epsilon or norm differs" in comparison_line(ahead[0], with_flags(ahead[1].evaluation.flags, epsilon=0.5))


def test_seeds_on_the_same_images_are_not_more_images():
    """Two seeds that agree on every image say as much about other images as one of them."""
    pair = with_flags("1" * 60 + "0" * 40), with_flags("1" * 30 + "0" * 70)
    one, two = worst_case_difference([pair]), worst_case_difference([pair, pair])
    assert two.model_dump() == pytest.approx(one.model_dump())
    against = with_flags("0" * 40 + "1" * 60), with_flags("0" * 70 + "1" * 30)
    other_seed = worst_case_difference([pair, against])
    assert other_seed.value == pytest.approx(30)
    assert other_seed.high - other_seed.low < one.high - one.low


def test_the_interval_over_two_seeds_by_hand():
    """Differences 2, 1, 0, -1 of four images: mean 0.25, so 25 points; 6 squares, 4 for the two images that are added."""
    seeds = [(with_flags("1100"), with_flags("0000")), (with_flags("1000"), with_flags("0001"))]
    difference = worst_case_difference(seeds)
    half = 1.959964 * (10 - 4 / 6) ** 0.5 / 6
    expected = (25.0, 50 * (2 / 6 - half), 50 * (2 / 6 + half))
    assert (difference.value, difference.low, difference.high) == pytest.approx(expected)


def test_pairs_that_were_attacked_differently_are_left_out():
    pair = with_flags("10"), with_flags("01")
    more_attacks = attacked(with_flags("11"), "pgd_50", "pgd_10"), with_flags("00")
    assert worst_case_difference([pair, more_attacks]) == worst_case_difference([pair])
    assert worst_case_difference([more_attacks]) is None
    assert "it was attacked differently" in comparison_line(*more_attacks)
    earlier_attacks = with_flags("11", ra_worst=..., ra_worst_quick=40.0)  # another one has RA-worst by an earlier evaluation
    assert "it was attacked differently" in comparison_line(earlier_attacks, pair[1])


def test_seeds_under_other_attacks_than_the_first_are_not_averaged_with_it():
    pair = with_flags("10"), with_flags("01")
    quick = [with_flags(flags, ra_worst=..., ra_worst_quick=40.0) for flags in ("11", "00")]
    assert worst_case_difference([quick]).value == 100
    assert worst_case_difference([pair, quick]) == worst_case_difference([pair])


def test_a_missing_attack_on_the_routing_is_the_reason_if_all_other_attacks_are_the_same():
    routed, dense = (attacked(with_flags("10", method=method), "pgd_50") for method in ("advmoe", "at_dense"))
    for network in (routed, dense):
        network.evaluation.left_out = {"reroute": "works only in Linf"}
    dense.layers, dense.evaluation.routing = [], None
    assert "attacks on the routing, which only one of the two networks has, were left out" in comparison_line(dense, routed)
    routed.evaluation.left_out = {}
    assert "it was attacked differently" in comparison_line(dense, routed)


def test_a_network_that_another_attack_met_on_some_images_is_not_compared():
    partly = with_flags("10")
    partly.evaluation.partly_run = {"soft_1": "1 of 4 shards"}
    assert "it was attacked differently" in comparison_line(partly, with_flags("10"))


def test_a_network_under_attacks_with_other_settings_is_not_compared():
    low = with_flags("10", attack_precision="bfloat16")
    assert "its attacks had other settings (attack gradients: float32, not bfloat16)" in comparison_line(low, with_flags("10"))
    assert "on the same images: +0.0 points" in comparison_line(with_flags("10", attack_precision="float32"), with_flags("10"))


@pytest.mark.parametrize(
    ("name", "field", "values", "text"),
    [
        ("paths", "pathway_budget", (64, 8), "pathway budget of paths: 8, not 64"),
        ("transfer", "transfer", ("a", "b"), "source network of transfer: b, not a"),
    ],
)
def test_a_network_under_another_pathway_budget_or_transfer_network_is_not_compared(name, field, values, text):
    records = [attacked(with_flags("10"), name) for _ in range(3)]
    for result, value in zip(records, values, strict=False):
        setattr(result.evaluation.attacks[name], field, value)
    one, other, silent = records
    assert f"its attacks had other settings ({text}); evaluate both with the same" in comparison_line(one, other)
    for result in (one, silent):  # an older Record does not say it
        assert "on the same images" in comparison_line(result, one)


def test_a_network_attacked_by_another_version_is_not_compared():
    old, new = (attacked(with_flags("10"), "reroute") for _ in range(2))
    old.evaluation.attacks["reroute"].version = 1
    assert "by another version" in comparison_line(new, old)
    assert "on the same images: +0.0 points" in comparison_line(new, new)

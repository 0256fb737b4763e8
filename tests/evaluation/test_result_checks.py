"""Every self-check of the results passes and fails where it should, on cases made by hand."""

from collections.abc import Sequence

import pytest

from advmoe.evaluation.record_evaluation import RoutingFigures
from advmoe.evaluation.result_checks import autoattack_reliable, images_valid, routing_alive, square
from advmoe.evaluation.store import AttackRun, Shard

RA_AA = {"ra_aa": 40.0}


def shard(rows: int = 1000, **broken: Sequence[int]) -> Shard:
    attacked = list(range(rows))
    attacks = {
        name: AttackRun(rows=attacked, transfer=None, broken=list(rows_broken), outside=0, seconds=0.0)
        for name, rows_broken in broken.items()
    }
    return Shard(rows=attacked, correct=attacked, attacks=attacks)


def routing(load: list[list[int]]) -> RoutingFigures:
    return RoutingFigures(
        ra_router=0, ra_expert=0, flip_rate=12.5, overlap=[], load=load, load_adv=load, fixed_expert_sa=[], fixed_expert_ra=[]
    )


@pytest.mark.parametrize(("rows", "broken", "status"), [(1000, 2, "pass"), (1000, 3, "warn"), (100, 1, "pass"), (100, 2, "warn")])
def test_square_may_add_a_fifth_of_a_point_or_one_image(rows: int, broken: int, status: str) -> None:
    assert square([shard(rows, aa_square=range(broken))], RA_AA).status == status


def test_square_of_autoattack_plus_is_not_judged() -> None:
    """It runs before the targeted attacks, which never get the images that it breaks."""
    assert square([shard(100, aaplus_square=range(2))], {"ra_aa_plus": 40.0}).status == "skipped"
    assert square([shard(100, my_square=range(2))], {"ra_50": 40.0}).status == "skipped"  # an attack that a user added


def test_autoattack_plus_is_compared_with_the_worst_case_like_autoattack() -> None:
    assert autoattack_reliable({"ra_aa_plus": 42.0}, 40.0, 1000).status == "fail"
    assert autoattack_reliable({"ra_aa_few_classes": 42.0}, 40.0, 1000).status == "fail"
    assert autoattack_reliable({"ra_aa": 42.0, "ra_aa_plus": 40.0}, 40.0, 1000).status == "fail"


def test_square_is_judged_only_with_the_figure_of_its_autoattack() -> None:
    assert square([shard(100, aa_square=[0, 1])], {}).status == "skipped"
    both = square([shard(100, aa_square=[0, 1], aaplus_square=[0]), shard(100, aa_square=[], aaplus_square=[])], RA_AA)
    assert (both.status, both.detail) == ("warn", "Square broke 1.00 points that gradient attacks did not")


def test_images_that_gradients_broke_do_not_count_for_square() -> None:
    """Square alone, after AutoAttack, runs on all images again."""
    again = shard(100, **{"aa_apgd-ce": range(50), "aa_square": range(51)})
    assert square([again], RA_AA).detail == "Square broke 1.00 points that gradient attacks did not"


def test_with_few_classes_the_substitute_of_an_attack_counts_as_a_gradient_attack() -> None:
    again = shard(100, apgd_t=[0, 1], aa_square=[0, 1])
    assert square([again], {"ra_aa_few_classes": 40.0}).detail == "Square broke 0.00 points that gradient attacks did not"
    assert square([again], RA_AA).detail == "Square broke 2.00 points that gradient attacks did not"


@pytest.mark.parametrize(
    ("total", "gap", "status"), [(1000, 0.5, "pass"), (1000, 0.6, "fail"), (64, 100 / 64, "pass"), (64, 200 / 64, "fail")]
)
def test_autoattack_more_than_half_a_point_or_one_image_above_the_worst_is_unreliable(total: int, gap: float, status: str) -> None:
    assert autoattack_reliable({"ra_aa": 40 + gap}, 40.0, total).status == status
    assert autoattack_reliable({"ra_50": 90.0}, 40.0, total).status == "skipped"


@pytest.mark.parametrize(
    ("load", "status"), [([[50, 50], [60, 40]], "pass"), ([[50, 50], [96, 4]], "warn"), ([[95, 5]], "pass"), ([[100]], "pass")]
)
def test_a_collapsed_layer_warns(load: list[list[int]], status: str) -> None:
    check = routing_alive(routing(load))
    assert check.status == status
    assert "12.5 %" in check.detail


def test_a_layer_with_one_busy_expert_is_counted() -> None:
    detail = routing_alive(routing([[50, 50], [96, 4]])).detail
    assert detail.startswith("1 of 2 layers sends over 95 % of the images to one expert; busiest expert 96%; ")


def test_experts_are_skipped_without_routing_figures() -> None:
    assert routing_alive(None).status == "skipped"


def test_images_outside_the_ball_fail() -> None:
    good, bad = shard(pgd_10=[]), shard(pgd_10=[])
    bad.attacks["pgd_10"].outside = 1
    assert images_valid([good]).status == "pass"
    check = images_valid([good, bad])
    assert check.status == "fail"
    assert "pgd_10: 1 outside" in check.detail

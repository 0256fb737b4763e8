"""Every self-check can say yes and can say no, on cases made by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmoe.evaluation import PRESETS, checks, evaluate
from advmoe.evaluation.record_evaluation import Check, RoutingFigures
from advmoe.evaluation.store import AttackRun, Shard
from advmoe.evaluation.target import Target
from advmoe.moe import HARD, Gate, Routing

SIDE = 4


class Net(nn.Module):
    """Two logits, -m and m, of the mean pixel's distance m from 0.5, times `slope`."""

    def __init__(self, slope: float = 10.0) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        m = self.slope * (x.flatten(1).mean(dim=1) - 0.5)
        return torch.stack([-m, m], dim=1)


class Routed(Net):
    """The same behind a router of two experts that are both this network; the router looks at the first pixel."""

    def routing(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, 0, 0], 1 - x[:, 0, 0, 0]], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        logits = self.routing(x)
        return super().forward(x), [Routing(logits, gate.weights(logits, 0).experts)]


def images(*means: float) -> tuple[Tensor, Tensor]:
    """Flat grey images and their classes."""
    x = torch.tensor(means)[:, None, None, None].expand(-1, 1, SIDE, SIDE).contiguous()
    return x, (x[:, 0, 0, 0] > 0.5).long()


def target(model: nn.Module, x: Tensor, y: Tensor, epsilon: float = 0.1, **fields: Any) -> Target:
    return replace(Target(model, model, x, y, 2, hasattr(model, "forward_routed"), epsilon, "Linf", 0), **fields)


GREYS = images(*torch.linspace(0.05, 0.95, 40).tolist())


def run(check: Any, model: nn.Module, data: tuple[Tensor, Tensor] = GREYS, **fields: Any) -> Check:
    with torch.no_grad():
        found: Check = check(target(model, *data, **fields), *data)
    return found


# (1)


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-2 * torch.randn(len(x), 2)


class BatchStatistics(Net):
    """What a batch normalisation in train mode does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean() + 0.5)


class Positional(Net):
    """The answer depends on the place in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.arange(len(x))[:, None]


class RoutedByCompany(Routed):
    """Decided routes that depend on the batch, although the logits do not."""

    def routing(self, x: Tensor) -> Tensor:
        return super().routing(x) * (1 if len(x) > 1 else -1)


class Coin(Routed):
    """A router without an opinion that tosses a coin."""

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        logits, routings = super().forward_routed(x, gate)
        return logits, [Routing(0 * routing.logits, torch.randint(2, (len(x),))) for routing in routings]


class Undecided(Routed):
    """A router whose two logits differ by rounding alone, which goes with the batch's size, and experts that differ."""

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        logits = torch.tensor([[0.5, 0.5]]) + 1e-7 * torch.tensor([[1.0, -1.0]]) * (1 if len(x) > 1 else -1)
        logits = logits.expand(len(x), 2)
        experts = logits.argmax(dim=1)
        return Net.forward(self, x) + experts[:, None], [Routing(logits, experts)]


@pytest.mark.parametrize("model", [Net(), Routed()])
def test_a_settled_network_is_consistent(model: nn.Module) -> None:
    assert run(checks.consistency, model).status == "pass"


@pytest.mark.parametrize("model", [Noisy(), BatchStatistics(), Positional(), RoutedByCompany(), Coin()])
def test_answers_that_change_with_chance_or_company_fail(model: nn.Module) -> None:
    torch.manual_seed(0)
    assert run(checks.consistency, model).status == "fail"


def test_undecided_images_are_listed_and_not_failed() -> None:
    found = run(checks.consistency, Undecided())
    assert found.status == "pass"
    assert "0 routes differ; 40 images with a router margin under 1e-05" in found.detail


@pytest.mark.parametrize(("offset", "status"), [(0.5e-4, "pass"), (2e-4, "fail")])
def test_logits_may_differ_by_1e_4(offset: float, status: str) -> None:
    class Near(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + offset * (len(x) == 1)

    assert run(checks.consistency, Near()).status == status


def test_large_logits_may_differ_by_a_share_of_the_largest() -> None:
    class Large(Net):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return 1e4 * logits / logits.abs().amax(dim=1, keepdim=True) + 0.5 * (len(x) == 1)

    assert run(checks.consistency, Large()).status == "pass"


# (2)


class Softmax(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(dim=1)


def test_probabilities_fail_and_logits_pass() -> None:
    assert run(checks.logits_not_softmax, Net()).status == "pass"
    assert run(checks.logits_not_softmax, Softmax()).status == "fail"
    assert run(checks.logits_not_softmax, nn.Sequential(Softmax(), nn.LogSoftmax(dim=1))).status == "pass"


class Second(Net):
    """Answers otherwise from the second look on."""

    looks = 0

    def forward(self, x: Tensor) -> Tensor:
        self.looks += 1
        return super().forward(x) * (1 if self.looks == 1 else -1)


def test_epsilon_0_gives_clean_accuracy_or_fails() -> None:
    assert run(checks.zero_epsilon, Net()).status == "pass"
    assert run(checks.zero_epsilon, Second()).status == "fail"


# (3)


class Flat(Net):
    """No gradient where the mean pixel is above `edge`."""

    def __init__(self, edge: float) -> None:
        super().__init__()
        self.edge = edge

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        flat = x.flatten(1).mean(dim=1, keepdim=True) > self.edge
        return torch.where(flat, logits.detach() + 0 * logits, logits)


class CutRouter(Routed):
    def routing(self, x: Tensor) -> Tensor:
        return super().routing(x).detach()


class NanRouter(Routed):
    def routing(self, x: Tensor) -> Tensor:
        return super().routing(x) * torch.nan


class RoundedRouter(Routed):
    def routing(self, x: Tensor) -> Tensor:
        return super().routing(x).mul(10).round()


def hundreds(count: int, silent: int) -> tuple[Tensor, Tensor]:
    """`silent` images of `count` where Flat(0.9) has no gradient."""
    return images(*[0.3] * (count - silent), *[0.95] * silent)


@pytest.mark.parametrize("model", [Net(), Routed()])
def test_gradients_everywhere_pass(model: nn.Module) -> None:
    assert run(checks.gradients, model, epsilon=0.01).status == "pass"


@pytest.mark.parametrize("model", [CutRouter(), NanRouter(), RoundedRouter(), Net(1e4), Flat(0.5)])
def test_missing_gradients_fail(model: nn.Module) -> None:
    assert run(checks.gradients, model, epsilon=0.01).status == "fail"


@pytest.mark.parametrize(
    ("count", "silent", "status"), [(300, 2, "pass"), (300, 3, "fail"), (50, 1, "pass"), (50, 2, "fail"), (40, 0, "pass")]
)
def test_one_percent_or_one_image_may_be_silent(count: int, silent: int, status: str) -> None:
    assert run(checks.gradients, Flat(0.9), hundreds(count, silent), epsilon=0.01).status == status


# (4), (5), (6), (11): read from what was run


def shard(rows: int = 1000, **broken: Sequence[int]) -> Shard:
    attacked = list(range(rows))
    attacks = {
        name: AttackRun(rows=attacked, transfer=None, broken=list(gone), outside=0, seconds=0.0) for name, gone in broken.items()
    }
    return Shard(rows=attacked, correct=attacked, attacks=attacks)


def routing(load: list[list[int]]) -> RoutingFigures:
    return RoutingFigures(
        ra_router=0, ra_expert=0, flip_rate=12.5, overlap=[], load=load, load_adv=load, fixed_expert_sa=[], fixed_expert_ra=[]
    )


@pytest.mark.parametrize(("rows", "broken", "status"), [(1000, 2, "pass"), (1000, 3, "warn"), (100, 1, "pass"), (100, 2, "warn")])
def test_square_may_add_a_fifth_of_a_point_or_one_image(rows: int, broken: int, status: str) -> None:
    assert checks.square([shard(rows, aa_square=range(broken))]).status == status


def test_autoattack_plus_is_judged_too() -> None:
    assert checks.square([shard(100, aaplus_square=range(2))]).status == "warn"
    assert checks.square([shard(100, my_square=range(2))]).status == "skipped"  # an attack that a user added
    assert checks.autoattack_reliable({"ra_aa_plus": 42.0}, 40.0, 1000).status == "fail"
    assert checks.autoattack_reliable({"ra_aa": 42.0, "ra_aa_plus": 40.0}, 40.0, 1000).status == "fail"


def test_square_counts_the_shards_that_it_has_been_run_on() -> None:
    assert checks.square([shard()]).status == "skipped"
    assert checks.square([shard(100, aa_square=[0, 1]), shard(10_000)]).status == "warn"


@pytest.mark.parametrize(
    ("total", "gap", "status"), [(1000, 0.5, "pass"), (1000, 0.6, "fail"), (64, 100 / 64, "pass"), (64, 200 / 64, "fail")]
)
def test_autoattack_half_a_point_or_one_image_above_the_worst_is_unreliable(total: int, gap: float, status: str) -> None:
    assert checks.autoattack_reliable({"ra_aa": 40 + gap}, 40.0, total).status == status
    assert checks.autoattack_reliable({"ra_50": 90.0}, 40.0, total).status == "skipped"


@pytest.mark.parametrize(
    ("load", "status"), [([[50, 50], [60, 40]], "pass"), ([[50, 50], [96, 4]], "warn"), ([[95, 5]], "pass"), ([[100]], "pass")]
)
def test_a_collapsed_layer_warns(load: list[list[int]], status: str) -> None:
    found = checks.routing_alive(target(Routed(), *GREYS), routing(load))
    assert found.status == status
    assert "12.5 %" in found.detail


def test_experts_of_a_network_that_does_not_route_are_skipped() -> None:
    assert checks.routing_alive(target(Net(), *GREYS), None).status == "skipped"
    assert checks.routing_alive(target(Routed(), *GREYS), None).status == "skipped"


def test_images_outside_the_ball_fail() -> None:
    good, bad = shard(pgd_10=[]), shard(pgd_10=[])
    bad.attacks["pgd_10"].outside = 1
    assert checks.images_valid([good]).status == "pass"
    found = checks.images_valid([good, bad])
    assert found.status == "fail"
    assert "pgd_10: 1 outside" in found.detail


# (7) to (10), (12): attack anew


class Maze(Net):
    """Robust until the attack has taken `patience` looks with a gradient: only a larger budget breaks it."""

    def __init__(self, patience: int) -> None:
        super().__init__()
        self.patience, self.looks = patience, 0

    def forward(self, x: Tensor) -> Tensor:
        self.looks = self.looks + 1 if x.requires_grad else self.looks
        return super().forward(x) * (-1 if self.looks > self.patience else 1)


def test_a_budget_that_suffices_passes_and_one_that_does_not_warns() -> None:
    assert run(checks.budget_suffices, Net()).status == "pass"
    assert run(checks.budget_suffices, Maze(100)).status == "warn"  # 10 + 50 looks leave it whole, the next 200 do not


class Rewarding(Net):
    """Recovers with the budget: right on the clean images, wrong after 10 and 50 steps, right again after 200."""

    judged = 0

    def forward(self, x: Tensor) -> Tensor:
        self.judged += not x.requires_grad
        return super().forward(x) * (-1 if self.judged in (2, 3) else 1)


def test_accuracy_that_rises_with_the_budget_is_a_change_too() -> None:
    assert run(checks.budget_suffices, Rewarding(), epsilon=1e-3).status == "warn"


def test_accuracy_that_falls_to_nothing_passes_and_that_rises_or_stays_fails() -> None:
    assert run(checks.falls_with_epsilon, Net(), epsilon=0.1).status == "pass"
    assert run(checks.falls_with_epsilon, Net(), epsilon=1e-3).status == "fail"  # 8 times that breaks hardly any
    assert run(checks.falls_with_epsilon, Flat(-1.0), epsilon=0.05).status == "fail"


@pytest.mark.parametrize(
    ("count", "left", "status"), [(30, 1, "pass"), (30, 2, "fail"), (7, 1, "pass"), (120, 2, "pass"), (120, 3, "fail")]
)
def test_two_percent_or_one_image_may_stand_at_8_times_epsilon(count: int, left: int, status: str) -> None:
    data = images(*[0.45] * (count - left), *[0.0] * left)  # 8 * 0.05 = 0.4 turns the grey ones alone
    assert run(checks.falls_with_epsilon, Net(), data, epsilon=0.05).status == status


def test_a_transfer_that_beats_the_white_box_fails() -> None:
    data = images(*torch.linspace(0.42, 0.58, 40).tolist())
    masked = Flat(-1.0)
    assert run(checks.iterated_beats_one_step, Net(), data).status == "pass"
    assert run(checks.iterated_beats_one_step, Net(), data, transfer=Net()).status == "pass"
    found = run(checks.iterated_beats_one_step, masked, data, transfer=Net())
    assert found.status == "fail"
    assert "transfer 0.0 %" in found.detail


class OneStep(Net):
    """The gradient shows the way at the clean image, grey of 0.4, alone: elsewhere it points back."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        clean = ((x - 0.4).abs().flatten(1).amax(dim=1) < 1e-6)[:, None]
        return torch.where(clean, logits, 2 * logits.detach() - logits)


def test_one_step_that_beats_the_iterated_attack_fails() -> None:
    data = images(*[0.4] * 20)
    assert run(checks.iterated_beats_one_step, Net(), data, epsilon=0.15).status == "pass"
    found = run(checks.iterated_beats_one_step, OneStep(), data, epsilon=0.15)
    assert found.status == "fail"
    assert found.detail.startswith("one step 0.0 %, iterated 100.0 %")


class Speckled(Net):
    """Wrong wherever the pixels of an image differ by much: random points are, those that sign steps lead to are not."""

    def forward(self, x: Tensor) -> Tensor:
        rough = (x.flatten(1).amax(dim=1) - x.flatten(1).amin(dim=1) > 0.1).float()
        return super().forward(x) * (1 - 2 * rough)[:, None]


def test_noise_that_breaks_what_pgd_left_warns() -> None:
    data = images(*[0.2] * 10, *[0.8] * 10)
    assert run(checks.noise_breaks_none, Net(), data).status == "pass"
    found = run(checks.noise_breaks_none, Speckled(), data)
    assert found.status == "warn"
    assert "20 of 20" in found.detail


class Descending(Net):
    """The gradient points the wrong way."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return 2 * logits.detach() - logits


@pytest.mark.parametrize(("model", "status"), [(Net(), "pass"), (Flat(-1.0), "fail"), (Descending(), "fail")])
def test_a_loss_that_does_not_rise_fails(model: nn.Module, status: str) -> None:
    assert run(checks.loss_rises, model).status == status


# all together


def test_a_preset_without_the_costly_checks_says_that_they_were_skipped() -> None:
    found = evaluate(Net().eval(), *GREYS, epsilon=0.1, preset=["pgd_10"])
    skipped = {check.number for check in found.checks if check.status == "skipped"}
    assert {check.number for check in found.checks} == set(range(1, 14))
    assert skipped == {4, 5, 6, 7, 8, 9, 10, 12}
    assert {check.number for check in found.checks if check.status == "pass"} == {1, 2, 3, 11, 13}


def test_the_thorough_presets_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = replace(PRESETS["standard"], figures={"ra_50": ("pgd_50",)}, survivors=())
    monkeypatch.setitem(PRESETS, "standard", preset)
    found = evaluate(Net().eval(), *GREYS, epsilon=0.1, preset="standard")
    assert [check.number for check in found.checks] == [1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert {check.number for check in found.checks if check.status == "skipped"} == {4, 5, 6}
    assert all(check.status in ("pass", "skipped") for check in found.checks), found.checks


# (13)


class NanRouter(Routed):
    """Its scores are NaN, of which argmax is 0; it classifies all the same."""

    def routing(self, x: Tensor) -> Tensor:
        return super().routing(x) * torch.nan


class ConstantRouter(Routed):
    def routing(self, x: Tensor) -> Tensor:
        return torch.tensor([[0.3, 0.7]]).expand(len(x), 2)


class NanBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor(torch.nan))


class NanGradient(Net):
    """The root's slope at 0 is infinite, and is multiplied by 0."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0 * x.flatten(1)[:, :1]).sqrt()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (NanRouter(), "scores of router 0"), (ConstantRouter(), "router 0 gives every image the same scores"),
        (NanBuffer(), "seen"), (NanGradient(), "gradient of the cross-entropy"),
    ],
)  # fmt: skip
def test_what_is_not_finite_or_constant_fails(model: nn.Module, words: str) -> None:
    found = run(checks.finiteness, model)
    assert (found.number, found.status) == (13, "fail")
    assert words in found.detail


@pytest.mark.parametrize("model", [Net(), Routed()])
def test_finite_networks_pass(model: nn.Module) -> None:
    assert run(checks.finiteness, model).status == "pass"


def test_a_nan_router_that_classifies_is_warned_of_before_any_attack(caplog: pytest.LogCaptureFixture) -> None:
    x, y = GREYS
    messages: list[int] = []
    with caplog.at_level("WARNING", "advmoe"):
        found = evaluate(
            NanRouter().eval(), x, y, epsilon=0.1, preset=("pgd_10",), progress=lambda *_: messages.append(len(caplog.records))
        )
    assert found.sa == 100
    assert [check.status for check in found.checks if check.number == 13] == ["fail"]
    assert messages == [1]
    assert "check 13 fails (not finite or constant: scores of router 0" in caplog.text

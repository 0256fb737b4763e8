"""Every self-check passes and fails where it should, on cases made by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks.presets import Preset
from advmoe.evaluation import PRESETS, checks, evaluate, runner
from advmoe.evaluation.record_evaluation import Check
from advmoe.evaluation.store import Store
from advmoe.evaluation.target import Target
from advmoe.evaluation.wrappers import LowPrecision
from advmoe.moe import HARD, Gate, Routing

SIDE = 4


class Net(nn.Module):
    """Two logits, -m and m, where m is `slope` times the difference of the mean pixel from 0.5."""

    def __init__(self, slope: float = 10.0) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        m = self.slope * (x.flatten(1).mean(dim=1) - 0.5)
        return torch.stack([-m, m], dim=1)


class Routed(Net):
    """The same network as both experts of a router that reads the first pixel."""

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
        result: Check = check(target(model, *data, **fields))
    return result


# (1)


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-2 * torch.randn(len(x), 2)


class BatchStatistics(Net):
    """Depends on the batch, as batch normalisation in train mode does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean() + 0.5)


class Positional(Net):
    """The logits depend on the position in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.arange(len(x))[:, None]


class RoutedByBatch(Routed):
    """Routes with a clear margin that depend on the batch, although the logits do not."""

    def routing(self, x: Tensor) -> Tensor:
        return super().routing(x) * (1 if len(x) > 1 else -1)


class RandomRouter(Routed):
    """A router with equal logits that chooses at random."""

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        logits, routings = super().forward_routed(x, gate)
        return logits, [Routing(0 * routing.logits, torch.randint(2, (len(x),))) for routing in routings]


class TiedRouter(Routed):
    """The router's two logits differ only by a rounding error that depends on the batch size; the experts differ."""

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        logits = torch.tensor([[0.5, 0.5]]) + 1e-7 * torch.tensor([[1.0, -1.0]]) * (1 if len(x) > 1 else -1)
        logits = logits.expand(len(x), 2)
        experts = logits.argmax(dim=1)
        return Net.forward(self, x) + experts[:, None], [Routing(logits, experts)]


@pytest.mark.parametrize("model", [Net(), Routed()])
def test_a_deterministic_network_is_consistent(model: nn.Module) -> None:
    assert run(checks.consistency, model).status == "pass"


@pytest.mark.parametrize("model", [Noisy(), BatchStatistics(), Positional(), RoutedByBatch(), RandomRouter()])
def test_logits_or_routes_that_depend_on_chance_or_on_the_batch_fail(model: nn.Module) -> None:
    torch.manual_seed(0)
    assert run(checks.consistency, model).status == "fail"


def test_images_with_tied_routers_are_listed_and_do_not_fail() -> None:
    check = run(checks.consistency, TiedRouter())
    assert check.status == "pass"
    assert "0 routes differ; 40 images with a router margin under 1e-05" in check.detail


@pytest.mark.parametrize(("offset", "status"), [(0.5e-4, "pass"), (2e-4, "fail")])
def test_logits_may_differ_by_1e_4(offset: float, status: str) -> None:
    class Near(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + offset * (len(x) == 1)

    assert run(checks.consistency, Near()).status == status


def test_large_logits_may_differ_by_a_fraction_of_the_largest() -> None:
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


class SecondCallDiffers(Net):
    """Returns other logits from the second call on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 if self.calls == 1 else -1)


def test_epsilon_0_must_give_the_clean_accuracy() -> None:
    assert run(checks.zero_epsilon, Net()).status == "pass"
    assert run(checks.zero_epsilon, SecondCallDiffers()).status == "fail"


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
    """Its routing logits are NaN. Their argmax is 0, so the network still classifies."""

    def routing(self, x: Tensor) -> Tensor:
        return super().routing(x) * torch.nan


class RoundedRouter(Routed):
    def routing(self, x: Tensor) -> Tensor:
        return super().routing(x).mul(10).round()


def partly_flat(count: int, silent: int) -> tuple[Tensor, Tensor]:
    """`silent` images of `count` where Flat(0.9) has no gradient."""
    return images(*[0.3] * (count - silent), *[0.95] * silent)


@pytest.mark.parametrize("model", [Net(), Routed()])
def test_gradients_everywhere_pass(model: nn.Module) -> None:
    assert run(checks.gradients, model, epsilon=0.01).status == "pass"


@pytest.mark.parametrize("model", [CutRouter(), NanRouter(), RoundedRouter(), Net(1e4), Flat(0.5)])
def test_missing_gradients_fail(model: nn.Module) -> None:
    assert run(checks.gradients, model, epsilon=0.01).status == "fail"


class RoundsToOne(nn.Module):
    """Its features are so near to 1 that bfloat16 rounds them to 1, and the ReLU behind them has no gradient at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(SIDE * SIDE, 2)
        with torch.no_grad():
            slope = 1e-3 / SIDE**2
            self.features.weight.copy_(torch.tensor([[-slope], [slope]]).expand(2, SIDE * SIDE))
            self.features.bias.copy_(1 + torch.tensor([1e-3, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = 1e4 * (self.features(x.flatten(1)) - 1).relu()
        return logits


@pytest.mark.parametrize(("bf16", "ra", "status"), [(False, 0.0, "pass"), (True, 100.0, "fail")])
def test_gradients_are_those_of_the_precision_of_the_attacks(bf16: bool, ra: float, status: str) -> None:
    data = images(*[0.38] * 20)
    evaluation = evaluate(RoundsToOne().eval(), *data, epsilon=0.2, preset=["pgd_10", "pgd_50"], bf16_search=bf16)
    assert evaluation.figures == {"ra_10": ra, "ra_50": ra}
    assert [check.status for check in evaluation.checks if check.number == 3] == [status]


class RoundedInLowPrecision(Routed):
    """Its routing logits have no gradient under autocast, and its class logits an infinite one."""

    def routing(self, x: Tensor) -> Tensor:
        return super().routing(x).detach() if torch.is_autocast_enabled("cpu") else super().routing(x)

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        logits, routings = super().forward_routed(x, gate)
        return (logits + (0 * x.flatten(1)[:, :1]).sqrt() if torch.is_autocast_enabled("cpu") else logits), routings


def test_routers_and_finite_gradients_are_those_of_the_precision_of_the_attacks() -> None:
    search = LowPrecision(RoundedInLowPrecision())
    check = run(checks.gradients, RoundedInLowPrecision(), search=search)
    assert "routers, start 100.0 %" in check.detail
    assert "gradient of the cross-entropy" in run(checks.finiteness, RoundedInLowPrecision(), search=search).detail


@pytest.mark.parametrize(
    ("count", "silent", "status"), [(300, 2, "pass"), (300, 3, "fail"), (50, 1, "pass"), (50, 2, "fail"), (40, 0, "pass")]
)
def test_one_percent_or_one_image_may_be_silent(count: int, silent: int, status: str) -> None:
    assert run(checks.gradients, Flat(0.9), partly_flat(count, silent), epsilon=0.01).status == status


# (7) to (10), (12): run further attacks


class Patient(Net):
    """Robust against the first `patience` gradients: only a larger budget breaks it."""

    def __init__(self, patience: int) -> None:
        super().__init__()
        self.patience, self.gradients = patience, 0

    def forward(self, x: Tensor) -> Tensor:
        self.gradients = self.gradients + 1 if x.requires_grad else self.gradients
        return super().forward(x) * (-1 if self.gradients > self.patience else 1)


def test_a_sufficient_budget_passes_and_an_insufficient_one_warns() -> None:
    assert run(checks.budget_suffices, Net()).status == "pass"
    assert run(checks.budget_suffices, Patient(100)).status == "warn"  # 10 + 50 steps do not break it, the next 200 do


class Recovering(Net):
    """Recovers with the budget: correct on the clean images, wrong after 10 and 50 steps, correct again after 200."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += not x.requires_grad
        return super().forward(x) * (-1 if self.calls in (2, 3) else 1)


def test_accuracy_that_rises_with_the_budget_warns() -> None:
    assert run(checks.budget_suffices, Recovering(), epsilon=1e-3).status == "warn"


def test_accuracy_must_fall_to_0_with_epsilon() -> None:
    assert run(checks.falls_with_epsilon, Net(), epsilon=0.1).status == "pass"
    assert run(checks.falls_with_epsilon, Net(), epsilon=1e-3).status == "fail"  # 8 times that breaks only a few
    assert run(checks.falls_with_epsilon, Flat(-1.0), epsilon=0.05).status == "fail"


@pytest.mark.parametrize(
    ("count", "robust", "status"), [(30, 1, "pass"), (30, 2, "fail"), (7, 1, "pass"), (120, 2, "pass"), (120, 3, "fail")]
)
def test_two_percent_or_one_image_may_be_robust_at_8_times_epsilon(count: int, robust: int, status: str) -> None:
    data = images(*[0.45] * (count - robust), *[0.0] * robust)  # 8 * 0.05 = 0.4 breaks only the grey ones
    assert run(checks.falls_with_epsilon, Net(), data, epsilon=0.05).status == status


def test_a_transfer_that_beats_the_white_box_fails() -> None:
    data = images(*torch.linspace(0.42, 0.58, 40).tolist())
    masked = Flat(-1.0)
    assert run(checks.iterated_beats_one_step, Net(), data).status == "pass"
    assert run(checks.iterated_beats_one_step, Net(), data, transfer=Net()).status == "pass"
    check = run(checks.iterated_beats_one_step, masked, data, transfer=Net())
    assert check.status == "fail"
    assert "transfer 0.0 %" in check.detail


def test_a_check_with_a_transfer_network_stays_without_one() -> None:
    """What the transfer broke stays broken in the figures."""
    data = images(*torch.linspace(0.42, 0.58, 40).tolist())
    store = Store(None, None)  # type: ignore[arg-type]

    def verdicts(transfer: nn.Module | None) -> list[str]:
        digest = None if transfer is None else type(transfer).__name__
        found = checks.check_network(target(Flat(-1.0), *data, transfer=transfer, transfer_digest=digest), True, store)
        return [check.status for check in found if check.number == 9]

    assert [verdicts(transfer) for transfer in (None, Net(), None, Flat(-1.0))] == [["pass"], ["fail"], ["fail"], ["pass"]]


class OneStep(Net):
    """The gradient is right only at the clean image, grey of 0.4; elsewhere its sign is reversed."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        clean = ((x - 0.4).abs().flatten(1).amax(dim=1) < 1e-6)[:, None]
        return torch.where(clean, logits, 2 * logits.detach() - logits)


def test_one_step_that_beats_the_iterated_attack_fails() -> None:
    data = images(*[0.4] * 20)
    assert run(checks.iterated_beats_one_step, Net(), data, epsilon=0.15).status == "pass"
    check = run(checks.iterated_beats_one_step, OneStep(), data, epsilon=0.15)
    assert check.status == "fail"
    assert check.detail.startswith("one step 0.0 %, iterated 100.0 %")


def test_an_image_that_one_step_makes_right_is_not_robust() -> None:
    """Greys of 0.45, labelled as light, are wrong; there one step goes the wrong way and makes them light."""
    x, y = images(*[0.4] * 20, *[0.45] * 20)
    check = run(checks.iterated_beats_one_step, OneStep(), (x, y + (torch.arange(40) >= 20)), epsilon=0.15)
    assert check.status == "fail"
    assert check.detail.startswith("one step 0.0 %, iterated 50.0 %")


class Speckled(Net):
    """Wrong if an image's pixels differ by much: true of random points, not of points that sign steps reach."""

    def forward(self, x: Tensor) -> Tensor:
        rough = (x.flatten(1).amax(dim=1) - x.flatten(1).amin(dim=1) > 0.1).float()
        return super().forward(x) * (1 - 2 * rough)[:, None]


def test_noise_that_breaks_what_pgd_does_not_warns() -> None:
    data = images(*[0.2] * 10, *[0.8] * 10)
    assert run(checks.noise_breaks_none, Net(), data).status == "pass"
    check = run(checks.noise_breaks_none, Speckled(), data)
    assert check.status == "warn"
    assert "20 of 20" in check.detail


class Descending(Net):
    """The gradient points the wrong way."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return 2 * logits.detach() - logits


@pytest.mark.parametrize(("model", "status"), [(Net(), "pass"), (Flat(-1.0), "fail"), (Descending(), "fail")])
def test_a_loss_that_does_not_rise_fails(model: nn.Module, status: str) -> None:
    assert run(checks.loss_rises, model).status == status


# all together


def test_finished_checks_are_kept_until_their_version_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset without the costly checks drops none of those that an earlier evaluation ran."""
    options = {"epsilon": 0.1, "store": tmp_path}
    preset = Preset({"ra_10": ("pgd_10",)}, (), checks=True)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "resolve", lambda _: preset)
        thorough = evaluate(Net(), *GREYS, **options).checks
    assert evaluate(Net(), *GREYS, preset=("pgd_10",), **options).checks == thorough
    assert {check.number for check in thorough if check.status == "skipped"} == {4, 5, 6}
    monkeypatch.setattr(checks, "VERSION", 99)
    quick = evaluate(Net(), *GREYS, preset=("pgd_10",), **options).checks
    assert {check.number for check in quick if check.status == "skipped"} == {4, 5, 6, 7, 8, 9, 10, 12}


class Watched(Routed):
    """Remembers the largest batch."""

    largest = 0

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        self.largest = max(self.largest, len(x))
        return super().forward_routed(x, gate)


def test_no_pass_has_more_images_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, preset = Watched(), Preset({"ra_10": ("pgd_10",), "ra_50": ("pgd_50",)}, ("paths",), checks=True)
    monkeypatch.setattr(runner, "resolve", lambda _: preset)
    data = images(0.1, 0.4, 0.45, 0.48, 0.52, 0.6, 0.7)
    small = evaluate(model, *data, epsilon=0.1, batch_size=4)
    assert model.largest == 4
    large = evaluate(model, *data, epsilon=0.1)
    assert model.largest == 7
    assert (small.broken, small.routing) == (large.broken, large.routing)
    assert [(check.number, check.status) for check in small.checks] == [(check.number, check.status) for check in large.checks]


def test_a_preset_without_the_costly_checks_lists_them_as_skipped() -> None:
    evaluation = evaluate(Net().eval(), *GREYS, epsilon=0.1, preset=["pgd_10"])
    skipped = {check.number for check in evaluation.checks if check.status == "skipped"}
    assert {check.number for check in evaluation.checks} == set(range(1, 14))
    assert skipped == {4, 5, 6, 7, 8, 9, 10, 12}
    assert {check.number for check in evaluation.checks if check.status == "pass"} == {1, 2, 3, 11, 13}


def test_at_epsilon_0_the_checks_of_attacks_have_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = replace(PRESETS["standard"], figures={"ra_50": ("pgd_50",)}, survivors=())
    monkeypatch.setitem(PRESETS, "standard", preset)
    evaluation = evaluate(Net().eval(), *GREYS, epsilon=0.0, preset="standard")
    details = {check.number: check.detail for check in evaluation.checks if check.status == "skipped"}
    assert {number: details.get(number) for number in (4, 5, 7, 8, 9, 10, 12)} == dict.fromkeys(
        (4, 5, 7, 8, 9, 10, 12), "epsilon is 0, so there is no attack to check"
    )
    assert {check.number for check in evaluation.checks if check.status == "pass"} == {1, 2, 3, 11, 13}


def test_the_preset_standard_runs_the_costly_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = replace(PRESETS["standard"], figures={"ra_50": ("pgd_50",)}, survivors=())
    monkeypatch.setitem(PRESETS, "standard", preset)
    evaluation = evaluate(Net().eval(), *GREYS, epsilon=0.1, preset="standard")
    assert [check.number for check in evaluation.checks] == [1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert {check.number for check in evaluation.checks if check.status == "skipped"} == {4, 5, 6}
    assert all(check.status in ("pass", "skipped") for check in evaluation.checks), evaluation.checks


# (13)


class ConstantRouter(Routed):
    def routing(self, x: Tensor) -> Tensor:
        return torch.tensor([[0.3, 0.7]]).expand(len(x), 2)


class NanBuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor(torch.nan))


class NanGradient(Net):
    """The infinite derivative of the square root at 0, times 0."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0 * x.flatten(1)[:, :1]).sqrt()


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (NanRouter(), "logits of router 0"), (ConstantRouter(), "router 0 gives every image the same logits"),
        (NanBuffer(), "seen"), (NanGradient(), "gradient of the cross-entropy"),
    ],
)  # fmt: skip
def test_values_that_are_not_finite_or_constant_fail(model: nn.Module, text: str) -> None:
    check = run(checks.finiteness, model)
    assert (check.number, check.status) == (13, "fail")
    assert text in check.detail


@pytest.mark.parametrize("model", [Net(), Routed()])
def test_finite_networks_pass(model: nn.Module) -> None:
    assert run(checks.finiteness, model).status == "pass"


@pytest.mark.parametrize("part", [(0, 1), (0, 2)])
def test_a_nan_router_gives_a_warning_before_any_attack(part: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    x, y = GREYS
    messages: list[int] = []
    with caplog.at_level("WARNING", "advmoe"):
        evaluation = evaluate(
            NanRouter().eval(), x, y, epsilon=0.1, preset=("pgd_10",), part=part,
            progress=lambda *_: messages.append(len(caplog.records)),
        )  # fmt: skip
    assert evaluation.sa == 100
    assert [check.status for check in evaluation.checks if check.number == 13] == ["fail"] * (part == (0, 1))
    assert messages == [1]
    assert "check 13 fails (not finite or constant: logits of router 0" in caplog.text

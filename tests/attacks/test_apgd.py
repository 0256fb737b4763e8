import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from advmoe.attacks import (
    Apgd,
    BatchDraws,
    ImageDraws,
    NetworkPair,
    apgd,
    cross_entropy,
    dlr,
    frozen,
    project,
    targeted_apgd,
    targeted_dlr,
)
from advmoe.attacks.apgd import checkpoints
from advmoe.attacks.geometry import uniform_start
from advmoe.errors import UserError


def random_images(count=24):
    return torch.rand(count, 1, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def small_net(classes=3):
    """A curved random net for which every class is about as likely."""
    torch.manual_seed(5)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.SiLU(), nn.Conv2d(6, 6, 3, 2), nn.SiLU(), nn.Flatten(), nn.Linear(24, classes)
    ).double()
    with torch.no_grad():
        for layer in (net[0], net[2], net[5]):
            layer.weight.mul_(4)
        net[-1].bias.sub_(net(random_images()).mean(dim=0))
    return net


def images(net, count=24):
    """Images, and the net's predictions as their labels."""
    with torch.no_grad():
        return random_images(count), net(random_images(count)).argmax(dim=1)


RADIUS = {"Linf": 0.06, "L2": 0.4}
NORMS = pytest.mark.parametrize("norm", RADIUS)


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
        (50, [11, 21, 29, 35, 40, 44, 47, 50]),
        (10, [3, 5, 6, 7, 8, 9, 10]),
        (1, [1]),
        (0, []),
    ],
)
def test_checkpoints_by_hand(num_steps, expected):
    assert checkpoints(num_steps) == expected


class Twin:
    """Algorithm 1 for one image, line by line, in lists. It ends at the first misclassified point, or returns the best one."""

    def __init__(self, net, x, label, start, settings, objective):
        self.net, self.x, self.label, self.settings, self.objective = net, x, label, settings, objective
        self.halvings = []
        self.result = self.run(start)

    def project(self, point):
        if self.settings.norm == "Linf":
            return point.clamp(self.x - self.settings.epsilon, self.x + self.settings.epsilon).clamp(0, 1)
        change = point - self.x
        return (self.x + change / max(1, change.norm().item() / self.settings.epsilon)).clamp(0, 1)

    def step(self, point):
        leaf = point.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.f(leaf)[0], leaf)
        return gradient.sign() if self.settings.norm == "Linf" else gradient / gradient.norm()

    def f(self, point):
        """The objective, and whether the point is misclassified."""
        logits = self.net(point[None])
        return self.objective(logits, torch.tensor([self.label]))[0], logits.argmax() != self.label

    def run(self, start):
        marks = checkpoints(self.settings.num_steps)
        points, eta = [start], 2 * self.settings.epsilon
        value, wrong = self.f(start)
        values = [value.item()]
        best, best_value, last_mark, mark_eta, mark_best = start, values[0], 0, eta, values[0]
        for k in range(self.settings.num_steps):
            if wrong:
                return points[k]
            ahead = self.project(points[k] + eta * self.step(points[k]))
            if k > 0:
                ahead = self.project(points[k] + 0.75 * (ahead - points[k]) + 0.25 * (points[k] - points[k - 1]))
            value, wrong = self.f(ahead)
            points.append(ahead)
            values.append(value.item())
            if values[-1] > best_value:
                best, best_value = points[-1], values[-1]
            if not wrong and k + 1 in marks:
                rises = sum(later > earlier for earlier, later in pairwise(values[last_mark:]))
                few = rises < self.settings.rho * (k + 1 - last_mark)
                if few or (eta == mark_eta and best_value == mark_best):
                    mark_eta, eta = eta, eta / 2
                    points[-1], values[-1] = best, best_value  # so the next step starts at the best point
                    self.halvings.append(k + 1)
                else:
                    mark_eta = eta
                last_mark, mark_best = k + 1, best_value
        return points[-1] if wrong else best


def double_cross_entropy(logits, y):  # ours computes in single precision, where late steps tie
    return nn.functional.cross_entropy(logits, y, reduction="none")


@pytest.mark.parametrize("rho", [0, 75, float("nan")])
def test_rho_is_a_share_of_the_steps(rho):
    with pytest.raises(UserError, match=rf"rho must be in \(0, 1\], not {rho}"):
        Apgd(0.1, rho=rho)


@NORMS
@pytest.mark.parametrize(("rho", "objective"), [(0.75, double_cross_entropy), (0.3, dlr)])
def test_agrees_with_its_slow_twin(norm, rho, objective):
    net = small_net()
    x, y = images(net)
    settings, draws = Apgd(RADIUS[norm] / 2, 30, norm=norm, rho=rho), [ImageDraws(2, range(24)) for _ in range(2)]
    with frozen(net):
        start = project(uniform_start(x, settings.epsilon, norm, draws[0]), x, settings.epsilon, norm)
        ours = apgd(net, x, y, settings, draws[1], objective)
        twins = [Twin(net, *row, settings, objective) for row in zip(x, y.tolist(), start, strict=True)]
    torch.testing.assert_close(ours, torch.stack([twin.result for twin in twins]), rtol=0, atol=1e-6)
    robust = (net(ours).argmax(dim=1) == y).nonzero()[:, 0].tolist()
    assert 5 < len(robust) < 19
    if rho < 0.75:  # the images' step sizes were halved at different checkpoints, never at none or at all of them
        halvings = {tuple(twins[row].halvings) for row in robust}
        assert len(halvings) > 1
        assert any(0 < len(marks) < len(checkpoints(30)) for marks in halvings)


@NORMS
@pytest.mark.parametrize("attack", [apgd, targeted_apgd])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_result_is_in_the_ball_and_in_the_pixel_range(norm, attack, classes):
    net = small_net(classes)
    x, y = images(net)
    x = x.round(decimals=1)
    y = net(x).argmax(dim=1)
    original = x.clone()
    with frozen(net):
        x_adv = attack(net, x, y, Apgd(RADIUS[norm], 10, restarts=2, norm=norm), ImageDraws(0, range(24)))
        robust = net(x_adv).argmax(dim=1) == y
    sizes = (x_adv - x).flatten(1).norm(dim=1, p=2 if norm == "L2" else torch.inf)
    assert sizes.max() <= RADIUS[norm] + 1e-9
    assert sizes.max() > 0.9 * RADIUS[norm]
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert robust.sum() < 24
    assert torch.equal(x, original)
    assert not x_adv.requires_grad


@NORMS
@pytest.mark.parametrize("objective", [cross_entropy, dlr])
def test_the_objective_never_falls_below_the_starts(norm, objective):
    net = small_net()
    x, y = images(net)
    results = {}
    for steps, restarts in [(0, 1), (3, 1), (20, 1), (20, 3)]:
        settings = Apgd(RADIUS[norm] / 4, steps, restarts, norm)
        with frozen(net):
            logits = net(apgd(net, x, y, settings, ImageDraws(3, range(24)), objective))
        results[steps, restarts] = objective(logits, y), logits.argmax(dim=1) == y
    (start, _), *later = results.values()
    for value, robust in later:
        assert robust.sum() > 5
        assert (value >= start)[robust].all()
    (one, robust_one), (three, robust_three) = later[-2:]
    assert (robust_three <= robust_one).all()
    assert (three >= one)[robust_three].all()


@NORMS
@pytest.mark.parametrize("attack", [apgd, targeted_apgd])
def test_an_images_result_does_not_depend_on_its_batch(norm, attack):
    net, settings = small_net(4), Apgd(RADIUS[norm], 15, restarts=2, norm=norm)
    x, y = images(net)
    with frozen(net):
        together = attack(net, x, y, settings, ImageDraws(0, range(24)))
        for part in (torch.tensor([5]), torch.tensor([20, 3, 11]), torch.arange(24).flip(0)):
            alone = attack(net, x[part], y[part], settings, ImageDraws(0, part.tolist()))
            torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-7)


class CountingNetwork:
    def __init__(self, net):
        self.net, self.rows = net, []

    def __call__(self, x):
        self.rows.append(len(x))
        return self.net(x)


def test_broken_images_cost_no_further_work():
    net = small_net(4)
    x, y = images(net)
    y[:6] = (y[:6] + 1) % 4  # misclassified from the start
    predict, settings = CountingNetwork(net), Apgd(RADIUS["Linf"] / 2, 10, restarts=3)
    with frozen(net):
        x_adv = apgd(predict, x, y, settings, ImageDraws(0, range(24)))
        num_robust = int((net(x_adv).argmax(dim=1) == y).sum())
    assert torch.equal(x_adv[:6], x[:6])
    assert predict.rows[:5] == [24, 18, 18, 18, 18]  # the images; the start and 3 steps to the first checkpoint
    assert predict.rows == sorted(predict.rows, reverse=True)
    assert 0 < num_robust < 18
    assert predict.rows[-1] in (num_robust, num_robust + 1)


def test_an_attack_that_has_broken_everything_stops():
    net = small_net()
    x, y = images(net)
    predict = CountingNetwork(net)
    with frozen(net):
        x_adv = targeted_apgd(predict, x, (y + 1) % 3, Apgd(0.1, 10, restarts=2), ImageDraws(0, range(24)))
    assert predict.rows == [24]
    assert torch.equal(x_adv, x)


def test_the_first_misclassified_point_is_returned():
    def band(x):  # class 0, except in a thin band around 0.8, where one step of 0.3 from 0.5 ends; beyond it the score rises
        score = x[:, 0, 0, 0]
        return torch.stack([torch.full_like(score, 2.0), torch.where((score - 0.8).abs() < 0.01, 3.0 + score, score)], dim=1)

    x, y = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), torch.tensor([0])
    x_adv = apgd(band, x, y, Apgd(0.3, 20), ImageDraws(0, [0]))
    assert x_adv.item() == pytest.approx(0.8)


def test_of_a_pair_of_networks_one_gives_the_gradients_and_one_judges():
    steps = []

    def falling(x):  # misclassifies every point; its cross-entropy rises with the pixel
        return torch.stack([-x[:, 0, 0, 0], torch.ones_like(x[:, 0, 0, 0])], dim=1)

    def judge(x):  # has no gradient; misclassifies points above 0.58
        steps.append(x.item())
        return torch.nn.functional.one_hot((x[:, 0, 0, 0] > 0.58).long(), 2).double()

    x, y = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), torch.tensor([0])
    x_adv = apgd(NetworkPair(falling, judge), x, y, Apgd(0.1, 20), ImageDraws(0, [0]))
    assert x_adv.item() == next(step for step in steps if step > 0.58)


@pytest.mark.parametrize("classes", [2, 3])
def test_two_and_three_classes_are_attacked_as_well_by_dlr_as_by_cross_entropy(classes):
    net = small_net(classes)
    x, y = images(net)
    settings = Apgd(RADIUS["Linf"] / 2, 30)
    with frozen(net):
        robust_counts = [
            (net(x_adv).argmax(dim=1) == y).sum().item()
            for x_adv in (
                apgd(net, x, y, settings, ImageDraws(0, range(24))),
                apgd(net, x, y, settings, ImageDraws(0, range(24)), dlr),
                targeted_apgd(net, x, y, settings, ImageDraws(0, range(24))),
            )
        ]
    assert 2 < robust_counts[0] < 22
    assert max(robust_counts) - min(robust_counts) <= 1


def test_targets_are_the_likeliest_wrong_classes_in_their_order(monkeypatch):
    seen_targets = []

    def biased(x):  # class 2 for every image, then 0, 3, 1, and far from any change
        return torch.tensor([2.0, 0.0, 9.0, 1.0]) + 0 * x.sum(dim=(1, 2, 3), keepdim=True)[:, :, 0, 0]

    def spy(logits, target):
        seen_targets.append(target.tolist())
        return targeted_dlr(logits, target)

    monkeypatch.setattr(sys.modules["advmoe.attacks.apgd"], "targeted_dlr", spy)
    x, y = torch.full((2, 1, 2, 2), 0.5), torch.tensor([2, 2])
    targeted_apgd(biased, x, y, Apgd(0.1, 0, restarts=2), ImageDraws(0, [0, 1]))
    targeted_apgd(biased, x, y, Apgd(0.1, 0, num_targets=1), ImageDraws(0, [0, 1]))
    assert seen_targets == [[[2, target_class]] * 2 for target_class in (0, 0, 3, 3, 1, 1, 0)]


@pytest.mark.parametrize("num_targets", [0, 4])
def test_impossible_numbers_of_targets_are_refused(num_targets):
    net = small_net(4)
    with pytest.raises(UserError, match=f"num_targets is {num_targets}: with 4 classes there are 1 to 3"):
        targeted_apgd(net, *images(net), Apgd(0.1, num_targets=num_targets), ImageDraws(0, range(24)))


def test_unknown_norms_are_refused():
    with pytest.raises(UserError, match="unknown norm 'l2': there is L2, Linf"):
        Apgd(0.1, norm="l2")


def test_epsilon_zero_returns_the_images_and_an_empty_batch_an_empty_batch():
    net = small_net()
    x, y = images(net)
    for norm in RADIUS:
        assert torch.equal(apgd(net, x, y, Apgd(0.0, 5, norm=norm), ImageDraws(0, range(24))), x)
        assert targeted_apgd(net, x[:0], y[:0], Apgd(0.1, 5, norm=norm), ImageDraws(0, [])).shape == (0, 1, 7, 7)


def test_batch_draws_make_the_attack_reproducible():
    net = small_net()
    x, y = images(net)
    settings = Apgd(RADIUS["L2"], 5, restarts=2, norm="L2")
    first, second = (apgd(net, x, y, settings, BatchDraws(torch.Generator().manual_seed(1))) for _ in range(2))
    assert torch.equal(first, second)

import math
import operator
from dataclasses import replace

import foolbox
import pytest
import torch
from torch import nn

from advmoe.attacks import Apgd, ImageDraws, Pgd, cross_entropy, evaluation_pgd, frozen, kl_divergence, pgd, project
from advmoe.attacks.geometry import ascent, length, uniform_start
from advmoe.errors import UserError

DRAWS = ImageDraws(0, [0])


def pair(a, b):
    """One image of two pixels."""
    return torch.tensor([a, b], dtype=torch.float64).view(1, 1, 1, 2)


def logits(score):
    """Two classes with logits 0 and `score` [B]: cross-entropy rises with the score for label 0, and falls for label 1."""
    return torch.stack([torch.zeros_like(score), score], dim=1)


def linear(x):
    return logits(x[:, 0, 0, 0] - 2 * x[:, 0, 0, 1])


class Constant:
    """Draws that give every pixel the same number: the next of `values` at each call."""

    def __init__(self, *values):
        self.values = iter(values)

    def uniform(self, x):
        return torch.full_like(x, next(self.values))

    normal = uniform


def pixels(x):
    return x.flatten().tolist()


def test_the_step_of_evaluations_is_a_quarter_of_epsilon():
    assert evaluation_pgd(8 / 255, 10).step_size == pytest.approx(2 / 255)
    assert evaluation_pgd(0.5, 50, "L2") == Pgd(0.5, 0.125, 50, norm="L2")


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (1, [0.54, 0.0]),  # the first pixel goes up, the second down and is stopped at 0
        (2, [0.58, 0.0]),
        (3, [0.6, 0.0]),  # 0.62 leaves the ball
        (9, [0.6, 0.0]),
    ],
)
def test_linear_model_by_hand(num_steps, expected):
    x_adv = pgd(linear, pair(0.5, 0.02), torch.tensor([0]), Pgd(0.1, 0.04, num_steps, start="none"), DRAWS)
    assert pixels(x_adv) == pytest.approx(expected, abs=1e-12)


def test_linear_model_by_hand_for_the_other_label():
    x_adv = pgd(linear, pair(0.5, 0.97), torch.tensor([1]), Pgd(0.1, 0.04, 2, start="none"), DRAWS)
    assert pixels(x_adv) == pytest.approx([0.42, 1.0], abs=1e-12)


@pytest.mark.parametrize(("num_steps", "expected"), [(1, 0.54), (2, 0.5), (3, 0.54)])
def test_the_gradient_is_computed_again_at_every_point(num_steps, expected):
    def peak(x):  # highest at 0.53: 0.5 goes up, 0.54 goes down
        return logits(-100 * (x[:, 0, 0, 0] - 0.53) ** 2)

    x_adv = pgd(peak, pair(0.5, 0.5), torch.tensor([0]), Pgd(0.1, 0.04, num_steps, start="none"), DRAWS)
    assert pixels(x_adv) == pytest.approx([expected, 0.5], abs=1e-12)


def test_a_pixel_stopped_at_zero_comes_back():
    def turning(x):
        a, b = x[:, 0, 0, 0], x[:, 0, 0, 1]
        return logits(10 * a * (b - 0.55) + b)

    # d/da = 10 * (b - 0.55) falls below 0 until b has passed 0.55, d/db = 10 * a + 1 is positive throughout:
    # (0, 0.5) -> (0, 0.54) -> (0, 0.58) -> (0.04, 0.6). If a went down to -0.08, a clamp in the graph would keep it there.
    x_adv = pgd(turning, pair(0.0, 0.5), torch.tensor([0]), Pgd(0.1, 0.04, 3, start="none"), DRAWS)
    assert pixels(x_adv) == pytest.approx([0.04, 0.6], abs=1e-12)


@pytest.mark.parametrize(("value", "direction"), [(0.0, 1), (1.0, -1)])
def test_saturated_pixels_move_from_a_random_start(value, direction):
    weights = direction * torch.linspace(1, 2, 75).view(3, 5, 5)
    x = torch.full((4, 3, 5, 5), value)
    labels, draws = torch.zeros(4, dtype=torch.int64), ImageDraws(3, range(4))
    x_adv = pgd(lambda z: logits((weights * (z - value)).sum(dim=(1, 2, 3))), x, labels, Pgd(0.1, 0.1, 1), draws)
    torch.testing.assert_close(x_adv, x + direction * 0.1)


def test_a_gradient_that_is_equal_for_all_pixels():
    x_adv = pgd(lambda x: logits(x.sum(dim=(1, 2, 3))), pair(0.5, 0.3), torch.tensor([0]), Pgd(0.1, 0.04, 1, start="none"), DRAWS)
    assert pixels(x_adv) == pytest.approx([0.54, 0.34], abs=1e-12)


@pytest.mark.parametrize(("start", "expected"), [("uniform", 0.55), ("normal", 0.5005), ("none", 0.5)])
def test_starts(start, expected):
    x_adv = pgd(linear, pair(0.5, 0.5), torch.tensor([0]), Pgd(0.1, 0.04, 0, start=start), Constant(0.5))
    assert pixels(x_adv) == pytest.approx([expected, expected], abs=1e-12)


def test_a_normal_start_is_projected():
    x_adv = pgd(linear, pair(0.5, 1.0), torch.tensor([0]), Pgd(0.01, 0.04, 0, start="normal"), Constant(1000.0))
    assert pixels(x_adv) == pytest.approx([0.51, 1.0], abs=1e-12)


def test_project_by_hand():
    x = pair(0.5, 0.95)
    assert pixels(project(pair(0.7, 1.2), x, 0.1)) == pytest.approx([0.6, 1.0])
    assert pixels(project(pair(0.3, 0.7), x, 0.1)) == pytest.approx([0.4, 0.85])
    assert pixels(project(pair(0.55, 0.9), x, 0.1)) == pytest.approx([0.55, 0.9])
    assert pixels(project(pair(-0.4, 0.9), pair(0.05, 0.9), 0.1)) == pytest.approx([0.0, 0.9])


@pytest.mark.parametrize("start", ["uniform", "normal", "none"])
def test_the_result_is_in_the_ball_and_in_the_pixel_range(start):
    model, x, y = small_net(), torch.rand(9, 3, 8, 8).round(decimals=1), torch.arange(9) % 3
    x_adv = pgd(model, x, y, Pgd(8 / 255, 5 / 255, 4, restarts=2, start=start), ImageDraws(0, range(9)))
    assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6
    assert (x_adv - x).abs().max() > 7.9 / 255
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not x_adv.requires_grad


@pytest.mark.parametrize("start", ["uniform", "normal", "none"])
def test_epsilon_zero_returns_the_images(start):
    model, x = small_net(), torch.rand(5, 3, 8, 8)
    settings = Pgd(0.0, 2 / 255, 5, restarts=2, start=start)
    assert torch.equal(pgd(model, x, torch.zeros(5, dtype=torch.int64), settings, ImageDraws(0, range(5))), x)


def test_the_attack_does_not_change_images_or_gradients():
    model, x = small_net(), torch.rand(5, 3, 8, 8)
    original = x.clone()
    first = next(model.parameters())
    first.grad = torch.full_like(first, 3.0)
    with torch.no_grad():
        pgd(model, x, torch.zeros(5, dtype=torch.int64), Pgd(0.1, 0.04, 3), ImageDraws(0, range(5)))
    assert torch.equal(x, original)
    assert not x.requires_grad
    assert torch.equal(first.grad, torch.full_like(first, 3.0))
    assert [p.grad for p in model.parameters()][1:] == [None] * (len(list(model.parameters())) - 1)
    assert all(p.requires_grad for p in model.parameters())


def two_peaks(x):
    """In the first pixel, a low peak at 0.45 and a high one at 0.58."""
    a = x[:, 0, 0, 0]
    return logits(torch.where(a < 0.5, 1 - 200 * (a - 0.45) ** 2, 2 - 200 * (a - 0.58) ** 2))


@pytest.mark.parametrize("order", [(-0.5, 0.8), (0.8, -0.5)])
def test_restarts_keep_the_worst(order):
    # x + 0.1 * -0.5 = 0.45 stays at the low peak, x + 0.1 * 0.8 = 0.58 at the high one
    x_adv = pgd(two_peaks, pair(0.5, 0.5), torch.tensor([0]), Pgd(0.1, 1e-4, 2, restarts=2), Constant(*order))
    assert x_adv[0, 0, 0, 0].item() == pytest.approx(0.58, abs=3e-4)
    one = pgd(two_peaks, pair(0.5, 0.5), torch.tensor([0]), Pgd(0.1, 1e-4, 2), Constant(*order))
    assert one[0, 0, 0, 0].item() == pytest.approx(0.5 + 0.1 * order[0], abs=3e-4)


def test_restarts_keep_the_worst_of_each_image():
    class Rows:
        def __init__(self):
            self.rows = iter([[-0.5, 0.8, -0.5], [0.8, -0.5, -0.5], [-0.5, -0.5, 0.8]])

        def uniform(self, x):
            return torch.tensor(next(self.rows), dtype=x.dtype)[:, None, None, None].expand(x.shape)

    x = pair(0.5, 0.5).repeat(3, 1, 1, 1)
    x_adv = pgd(two_peaks, x, torch.tensor([0, 0, 0]), Pgd(0.1, 1e-4, 2, restarts=3), Rows())
    assert x_adv[:, 0, 0, 0].tolist() == pytest.approx([0.58] * 3, abs=3e-4)


def test_more_restarts_never_lower_the_objective_or_the_number_of_misclassified_images():
    model, x, y = small_net(), torch.rand(6, 3, 8, 8), torch.arange(6) % 3
    values, fooled = [], []
    for restarts in (1, 2, 4):
        x_adv = pgd(model, x, y, Pgd(0.03, 0.02, 1, restarts=restarts), ImageDraws(0, range(6)))
        values.append(cross_entropy(model(x_adv), y).detach())
        fooled.append(model(x_adv).argmax(dim=1) != y)
    for before, after in ((0, 1), (1, 2)):
        assert (fooled[after] >= fooled[before]).all()
        assert ((values[after] >= values[before] - 1e-6) | (fooled[after] > fooled[before])).all()
    assert (values[2] > values[0]).any()


@pytest.mark.parametrize("order", [(-0.5, 0.8), (0.8, -0.5)])
def test_restarts_keep_a_misclassified_point_even_if_another_has_a_higher_cross_entropy(order):
    def three_classes(x):  # below 0.5 misclassified with cross-entropy 0.74, above correct with 1.03
        a = x[:, 0, 0, :1]
        return torch.where(a < 0.5, torch.tensor([0.0, 0.1, -9.0]), torch.tensor([1.0, 0.9, 0.9])) + 0 * a

    def point(target, objective):
        x_adv = pgd(three_classes, pair(0.5, 0.5), target, Pgd(0.1, 1e-4, 1, restarts=2), Constant(*order), objective)
        return x_adv[0, 0, 0, 0].item()

    assert point(torch.tensor([0]), cross_entropy) == pytest.approx(0.45)
    log_probs = torch.tensor([[0.98, 0.01, 0.01]]).log()  # no labels: the highest objective alone decides
    assert point(log_probs, kl_divergence) == pytest.approx(0.58)


def test_cross_entropy_by_hand():
    value = cross_entropy(torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]]), torch.tensor([0, 0]))
    assert value.tolist() == pytest.approx([math.log(4), math.log(1.25)], rel=1e-6)


def test_kl_divergence_by_hand():
    reference = torch.tensor([[0.25, 0.75], [0.8, 0.2]]).log()
    value = kl_divergence(torch.tensor([[5.0, 5.0], [0.0, math.log(4)]]), reference)
    expected = [0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5), 0.8 * math.log(4) + 0.2 * math.log(1 / 4)]
    assert value.tolist() == pytest.approx(expected, rel=1e-6)


def mixed_model():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model.train()
    model[1].eval()
    model[2].eval()
    model[2][0].train()
    model[0].weight.requires_grad_(False)
    return model


def state_of(model):
    return [module.training for module in model.modules()], [parameter.requires_grad for parameter in model.parameters()]


def test_frozen_is_eval_without_gradients_and_restores_the_state():
    model = mixed_model()
    before = state_of(model)
    assert before[0] == [True, True, False, False, True, False]
    with frozen(model):
        assert state_of(model) == ([False] * 6, [False] * 6)
        with frozen(model):
            pass
        assert state_of(model) == ([False] * 6, [False] * 6)
    assert state_of(model) == before


def test_frozen_restores_on_exceptions():
    model = mixed_model()
    before = state_of(model)
    with pytest.raises(KeyError), frozen(model):
        raise KeyError
    assert state_of(model) == before


def small_net():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
    )


def trained_net_and_images():
    """Noisy images of three classes, each bright in a different channel, and a net that classifies most of them correctly."""
    net, y = small_net(), torch.arange(60) % 3
    x = (torch.rand(60, 3, 8, 8) + 0.06 * torch.nn.functional.one_hot(y, 3)[:, :, None, None]).clamp(0, 1)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval(), x, y


def test_agrees_with_foolbox():
    net, x, y = trained_net_and_images()
    epsilon, step, steps = 6 / 255, 1.5 / 255, 7
    attack = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=steps, random_start=False)
    _, theirs, broken = attack(foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), x, y, epsilons=epsilon)
    with frozen(net):
        ours = pgd(net, x, y, Pgd(epsilon, step, steps, start="none"), ImageDraws(0, range(60)))
        robust = net(ours).argmax(dim=1) == y
        clean = net(x).argmax(dim=1) == y
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert robust.tolist() == [operator.not_(flag) for flag in broken.tolist()]
    assert 5 < robust.sum() < clean.sum() - 5


def test_l2_steps_by_hand():
    def slope(x):
        return logits(3 * x[:, 0, 0, 0] - 4 * x[:, 0, 0, 1])

    settings = Pgd(0.1, 0.05, 1, start="none", norm="L2")
    assert pixels(pgd(slope, pair(0.5, 0.5), torch.tensor([0]), settings, DRAWS)) == pytest.approx([0.53, 0.46], abs=1e-7)
    settings = replace(settings, num_steps=9)  # stopped at the ball
    assert pixels(pgd(slope, pair(0.5, 0.5), torch.tensor([0]), settings, DRAWS)) == pytest.approx([0.56, 0.42], abs=1e-7)
    assert pixels(pgd(slope, pair(0.5, 0.01), torch.tensor([0]), settings, DRAWS))[1] == 0


def test_l2_project_by_hand():
    x = pair(0.5, 0.95)
    assert pixels(project(pair(0.8, 0.55), x, 0.1, "L2")) == pytest.approx([0.56, 0.87])
    assert pixels(project(pair(0.53, 0.99), x, 0.1, "L2")) == pytest.approx([0.53, 0.99])  # inside
    assert pixels(project(pair(0.8, 1.35), x, 0.1, "L2")) == pytest.approx([0.56, 1.0])
    assert pixels(project(x, x, 0.1, "L2")) == pixels(x)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e30])
def test_l2_steps_have_one_length_whatever_the_gradients(scale):
    gradient = scale * torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert length(ascent(gradient, "L2")).flatten().tolist() == pytest.approx([1] * 5, rel=1e-4)
    assert torch.equal(ascent(torch.zeros(1, 3, 4, 4), "L2"), torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_l2_gradient_that_is_not_finite_in_one_pixel_moves_the_others(value):
    gradient = torch.tensor([value, 3.0, -4.0, 0.0]).view(1, 1, 2, 2)
    assert ascent(gradient, "L2").flatten().tolist() == pytest.approx([0, 0.6, -0.8, 0])


def test_l2_starts_fill_the_ball_evenly():
    x = torch.full((4000, 1, 1, 2), 0.5)
    change = uniform_start(x, 0.1, "L2", ImageDraws(0, range(4000))) - x
    radii, angles = length(change).flatten() / 0.1, torch.atan2(change[..., 0], change[..., 1]).flatten()
    assert radii.max() <= 1 + 1e-5
    for share in (0.25, 0.5, 0.75):  # of the disc's area lies within sqrt(share) of the radius
        assert (radii < share**0.5).float().mean().item() == pytest.approx(share, abs=0.03)
        assert (angles < (2 * share - 1) * math.pi).float().mean().item() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("start", ["uniform", "normal", "none"])
def test_l2_results_lie_in_the_ball_and_do_not_depend_on_the_batch(start):
    model, x, y = small_net().double(), torch.rand(9, 3, 8, 8).double().round(decimals=1), torch.arange(9) % 3
    settings = Pgd(0.5, 0.2, 5, restarts=2, start=start, norm="L2")
    x_adv = pgd(model, x, y, settings, ImageDraws(0, range(9)))
    assert length(x_adv - x).max() <= 0.5 + 1e-6
    assert length(x_adv - x).max() > 0.45
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    alone = pgd(model, x[4:5], y[4:5], settings, ImageDraws(0, [4]))
    assert torch.allclose(alone[0], x_adv[4], rtol=0, atol=1e-6)


def test_unknown_norms_are_refused():
    with pytest.raises(UserError, match="unknown norm 'l2': there is L2, Linf"):
        Pgd(0.1, 0.1, 1, norm="l2")
    x = torch.rand(1, 3, 4, 4)
    with pytest.raises(UserError, match="unknown norm 'l2'"):
        project(x + 1, x, 0.1, "l2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -0.1}, "epsilon must be at least 0, not -0.1"),
        ({"epsilon": float("nan")}, "epsilon must be at least 0, not nan"),
        ({"num_steps": -1}, "num_steps must be a whole number of at least 0, not -1"),
        ({"num_steps": 2.5}, "num_steps must be a whole number of at least 0, not 2.5"),
        ({"restarts": 0}, "restarts must be at least 1, not 0"),
        ({"step_size": -0.1}, "step_size must be at least 0, not -0.1"),
        ({"step_size": float("nan")}, "step_size must be at least 0, not nan"),
        ({"start": "random"}, "unknown start 'random': there is none, normal, uniform"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Pgd(**{"epsilon": 0.1, "step_size": 0.1, "num_steps": 1, **settings})
    if not {"start", "step_size"} & settings.keys():
        with pytest.raises(UserError, match=message):
            Apgd(**{"epsilon": 0.1, **settings})

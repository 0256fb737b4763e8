"""Surrogates give gradients that hard routing hides; the true network decides what is fooled."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.attacks import ImageDraws
from advmoe.attacks.surrogate import (
    Search,
    ascent_direction,
    margins,
    route_of,
    surrogate_pgd,
    through_gate,
    through_route,
    undecided,
    with_routing_margin,
)
from advmoe.moe import HARD, Gate, Routing, SoftGate, make_gate

B, C = 12, 3
EPSILON = 0.1


class Linear(nn.Module):
    """Images [B, 1, 2, 2]; `layers` linear routers over three linear experts of 3 classes, whose outputs are added."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.routers = nn.ModuleList(nn.Linear(4, 3) for _ in range(layers))
        self.experts = nn.ModuleList(nn.Linear(4, 3 * C) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        flat, routings = x.flatten(1), []
        total = torch.zeros(len(x), C)
        for layer, (router, expert) in enumerate(zip(self.routers, self.experts, strict=True)):
            logits, outputs = router(flat), expert(flat).unflatten(1, (3, C))
            weights = gate.weights(logits, layer)
            mixture = getattr(weights, "mixture", F.one_hot(weights.experts, 3).to(x))
            total = total + (mixture[:, :, None] * outputs).sum(dim=1)
            routings.append(Routing(logits, weights.experts))
        return total, routings


def images(count: int = B) -> Tensor:
    return torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(1))


def draws(rows: range | list[int] = range(B)) -> ImageDraws:
    return ImageDraws(3, rows)


class Offset:
    """A start at `offset` of the radius from every pixel."""

    def __init__(self, offset: float) -> None:
        self.offset = offset

    def uniform(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.offset)

    def normal(self, x: Tensor) -> Tensor:
        raise AssertionError("not drawn from")

    def rows(self, index: Tensor) -> "Offset":
        return self


# margins


def test_margins_by_hand() -> None:
    first = Routing(torch.tensor([[1.0, 3.0, 2.5], [0.0, -1.0, 4.0]]), torch.tensor([1, 2]))
    second = Routing(torch.tensor([[0.25, 0.0], [2.0, 2.0]]), torch.tensor([0, 0]))
    result = margins([first, second], torch.tensor([[1, 1], [0, 0]]))
    assert result.tolist() == [[0.5, -0.25], [-4.0, 0.0]]


def test_a_free_layer_and_a_layer_of_one_expert_have_infinite_margins() -> None:
    three = Routing(torch.tensor([[1.0, 3.0, 2.5]]), torch.tensor([1]))
    one = Routing(torch.tensor([[7.0]]), torch.tensor([0]))
    assert margins([three, one], torch.tensor([[-1, 0]])).tolist() == [[torch.inf, torch.inf]]
    assert margins([three, one], torch.tensor([[2, -1]])).tolist() == [[-0.5, torch.inf]]


def test_a_margin_is_undecided_relative_to_the_largest_logit_of_its_router() -> None:
    logits = torch.tensor([[1.0, 0.9], [0.5, 0.5 - 9e-6], [0.5, 0.5 - 2e-5], [-300.0, -300.002], [torch.nan, 0.0]])
    close, wide = Routing(logits, logits.argmax(dim=1)), Routing(torch.tensor([[1.0, 0.0]] * 5), torch.zeros(5, dtype=torch.int64))
    assert undecided([wide, close]).tolist() == [False, True, False, True, False]


def test_a_free_layer_leaves_the_gradient_finite() -> None:
    logits = torch.tensor([[1.0, 3.0]], requires_grad=True)
    margin = margins([Routing(logits, torch.tensor([1]))], torch.tensor([[-1]]))
    (gradient,) = torch.autograd.grad((0.05 - margin).clamp(min=0).sum(), logits)
    assert gradient.tolist() == [[0.0, 0.0]]


def test_route_of_has_one_column_for_each_layer() -> None:
    routings = [Routing(torch.zeros(2, 3), torch.tensor([0, 2])), Routing(torch.zeros(2, 3), torch.tensor([1, 1]))]
    assert route_of(routings).tolist() == [[0, 1], [2, 1]]


# the ascent


def test_steps_fall_from_half_of_epsilon_to_a_fiftieth_of_that() -> None:
    search = Search(EPSILON, 10)
    steps = [search.step(number) for number in range(10)]
    assert steps[0] == pytest.approx(EPSILON / 2)
    assert steps == sorted(steps, reverse=True)
    assert search.step(10) == pytest.approx(EPSILON / 100)


def test_stops_at_the_first_point_that_fools() -> None:
    """A loss that raises every pixel forever: the image stays at the first point that the true network misclassifies."""
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    means: list[float] = []

    def predict(z: Tensor) -> Tensor:
        means.append(z.mean().item())
        score = z.flatten(1).mean(dim=1) - 0.53
        return torch.stack([-score, score], dim=1)

    x_adv = surrogate_pgd(predict, lambda z, labels, rows: z.flatten(1).sum(dim=1), x, y, Search(EPSILON, 20), Offset(0))
    assert means[0] == pytest.approx(0.5)
    assert means[1] == pytest.approx(0.55)
    assert len(means) == 2
    assert x_adv.mean().item() == pytest.approx(0.55)


def test_a_start_that_fools_already_is_kept() -> None:
    x, y = images(), torch.zeros(B, dtype=torch.long)

    def wrong(z: Tensor) -> Tensor:
        return torch.tensor([[0.0, 1.0]]).expand(len(z), 2)

    def never(z: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        raise AssertionError("nothing is left to attack")

    start = (x + EPSILON * torch.full_like(x, 0.1)).clamp(0, 1)
    assert torch.equal(surrogate_pgd(wrong, never, x, y, Search(EPSILON, 5), Offset(0.1)), start)


def test_the_result_is_in_the_ball_and_in_the_pixel_range() -> None:
    model, x = Linear(), images().round()  # every pixel is 0 or 1
    y = model(x).argmax(dim=1)
    x_adv = surrogate_pgd(model, through_gate(model, SoftGate()), x, y, Search(EPSILON, 15), draws())
    assert (x_adv - x).abs().max() <= EPSILON + 1e-7
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not torch.equal(x_adv, x)


def test_a_start_outside_the_pixel_range_is_projected() -> None:
    x, y = torch.full((1, 1, 2, 2), 0.95), torch.tensor([0])
    logits = torch.tensor([[1.0, 0.0]])
    x_adv = surrogate_pgd(lambda z: logits, lambda z, labels, rows: z.flatten(1).sum(dim=1), x, y, Search(EPSILON, 0), Offset(1))
    assert torch.equal(x_adv, torch.ones_like(x))


@pytest.mark.parametrize("kind", ["straight_through", "soft"])
def test_breaks_images_that_a_random_start_does_not(kind: str) -> None:
    model, x = Linear(), images(64)
    y, search = model(x).argmax(dim=1), Search(0.2, 20)
    start = surrogate_pgd(model, through_gate(model, make_gate(kind)), x, y, Search(0.2, 0), draws(range(64)))
    x_adv = surrogate_pgd(model, through_gate(model, make_gate(kind)), x, y, search, draws(range(64)))
    assert (model(x_adv).argmax(dim=1) != y).sum() > (model(start).argmax(dim=1) != y).sum()


@pytest.mark.parametrize("make", ["gate", "route", "margin"])
def test_an_images_result_does_not_depend_on_its_batch(make: str) -> None:
    model, x = Linear(), images()
    y, route = model(x).argmax(dim=1), route_of(model.forward_routed(x)[1])

    def run(rows: list[int]) -> Tensor:
        surrogate = {
            "gate": through_gate(model, SoftGate()),
            "route": through_route(model, route[rows]),
            "margin": with_routing_margin(model, route[rows], -1.0),
        }[make]
        return surrogate_pgd(model, surrogate, x[rows], y[rows], Search(EPSILON, 10), draws(rows))

    full_batch = run(list(range(B)))
    for rows in ([0, 1, 2], [5], [11, 4, 7]):
        assert torch.allclose(run(rows), full_batch[rows], atol=1e-6)


def test_a_surrogate_of_nan_returns_the_start() -> None:
    model, x = Linear(), images()
    y = model(x).argmax(dim=1)
    start = surrogate_pgd(model, through_gate(model, HARD), x, y, Search(EPSILON, 0), draws())
    x_adv = surrogate_pgd(model, lambda z, labels, rows: z.flatten(1).sum(dim=1) * torch.nan, x, y, Search(EPSILON, 5), draws())
    assert torch.equal(x_adv, start)


# what each surrogate is


def test_through_route_is_the_forced_network() -> None:
    model, x, y = Linear(), images(), torch.arange(B) % C
    route = torch.stack([torch.arange(B) % 3, (torch.arange(B) + 1) % 3], dim=1)
    rows = torch.tensor([4, 0, 7])
    flat = x[rows].flatten(1)
    outputs = [expert(flat).unflatten(1, (3, C)) for expert in model.experts]
    forced = sum(out[torch.arange(3), route[rows, layer]] for layer, out in enumerate(outputs))
    expected = F.cross_entropy(forced, y[rows], reduction="none")
    assert torch.allclose(through_route(model, route)(x[rows], y[rows], rows), expected)


def test_through_the_clean_route_is_the_true_loss() -> None:
    model, x, y = Linear(), images(), torch.arange(B) % C
    loss = through_route(model, route_of(model.forward_routed(x)[1]))(x, y, torch.arange(B))
    assert torch.allclose(loss, F.cross_entropy(model(x), y, reduction="none"))


def test_through_gate_reaches_the_router_where_the_hard_gate_does_not() -> None:
    model, x, y = Linear(layers=1), images(), torch.arange(B) % C
    rows = torch.arange(B)
    for kind, reaches in (("hard", False), ("soft", True), ("straight_through", True)):
        (gradient,) = torch.autograd.grad(
            through_gate(model, make_gate(kind))(x, y, rows).sum(), model.routers[0].weight, allow_unused=True
        )
        assert (gradient is not None and bool(gradient.any())) == reaches


@pytest.mark.parametrize(("weight", "sign"), [(50.0, 1), (-50.0, -1)])
def test_the_weights_sign_decides_whether_margins_grow(weight: float, sign: int) -> None:
    model, x, y = Linear(), images(), torch.arange(B) % C
    route = route_of(model.forward_routed(x)[1])
    direction = ascent_direction(with_routing_margin(model, route, weight), x, y, torch.arange(B))
    moved = margins(model.forward_routed(x + 1e-3 * direction)[1], route).mean(dim=1)
    before = margins(model.forward_routed(x)[1], route).mean(dim=1)
    assert bool((sign * (moved - before) > 0).all())


def test_a_margin_of_weight_0_is_the_true_loss() -> None:
    model, x, y = Linear(), images(), torch.arange(B) % C
    route = route_of(model.forward_routed(x)[1])
    loss = with_routing_margin(model, route, 0.0)(x, y, torch.arange(B))
    assert torch.equal(loss, F.cross_entropy(model(x), y, reduction="none"))


def test_a_layer_of_one_expert_leaves_the_margins_loss_finite() -> None:
    """The infinite margin of a layer of one expert must not hide the margins of the other layers."""

    class WithOneExpert(Linear):
        def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
            logits, routings = super().forward_routed(x, gate)
            return logits, [*routings, Routing(torch.zeros(len(x), 1), torch.zeros(len(x), dtype=torch.long))]

    model, x, y = WithOneExpert(), images(), torch.arange(B) % C
    route = route_of(model.forward_routed(x)[1])
    with_one_expert, without = (
        with_routing_margin(network, route[:, :layers], -1.0) for network, layers in ((model, 3), (Linear(), 2))
    )
    rows = torch.arange(B)
    assert torch.isfinite(with_one_expert(x, y, rows)).all()
    assert torch.equal(ascent_direction(with_one_expert, x, y, rows), ascent_direction(without, x, y, rows))

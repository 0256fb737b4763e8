"""The network fixed on every pathway: planted networks whose weak pathway is known."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks import frozen
from advmoe.attacks.job import Job
from advmoe.attacks.pathways import (
    CHEAPEST,
    RANDOM,
    _one_after_another,
    attack_pathways,
    broken_on_a_pathway,
    notice,
    num_pathways,
    pathways,
)
from advmoe.config.choices import PATHWAY_BUDGET
from advmoe.errors import UserError
from advmoe.evaluation import Evaluation, evaluate
from advmoe.moe import HARD, Gate, Routing

EPSILON = 0.1


class Planted(nn.Module):
    """One router of four experts on images [B, 1, 2, 2]. It chooses expert 0 everywhere in the ball. Only expert `weak` can be
    fooled, by the second pixel; the others predict class 0 with a large margin."""

    def __init__(self, weak: int) -> None:
        super().__init__()
        self.weak, self.scale = weak, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        x = x.flatten(1) * self.scale
        routing_logits = torch.stack([x[:, 0] + 3, x[:, 1], x[:, 2], x[:, 3]], dim=1)
        chosen = gate.weights(routing_logits, 0).experts
        fragile = torch.stack([0.55 - x[:, 1], x[:, 1] - 0.55, x[:, 1] - 2], dim=1)
        firm = torch.tensor([5.0, 0.0, 0.0]) + 0.01 * x[:, :3]
        return torch.where((chosen == self.weak)[:, None], fragile, firm), [Routing(routing_logits, chosen)]


class Layers(nn.Module):
    """Seven routers of two experts: 128 pathways, more than are enumerated."""

    def __init__(self, routers: int = 7) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(routers, 9))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_routed(x)[0]

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
        x = x.flatten(1)
        scores = [torch.stack([x[:, layer], 1 - x[:, layer]], dim=1) for layer in range(len(self.weight))]
        routings = [Routing(logits, gate.weights(logits, layer).experts) for layer, logits in enumerate(scores)]
        return x @ self.weight.T[:, :3], routings


def grey(count: int = 5, side: int = 2) -> Tensor:
    return torch.full((count, 1, side, side), 0.5) + 0.001 * torch.arange(count)[:, None, None, None]


def job(model: nn.Module, x: Tensor, classes: int = 3) -> Job:
    return Job(model, x, torch.zeros(len(x), dtype=torch.long), range(len(x)), EPSILON, "Linf", 0, 0, classes)


def test_a_weak_pathway_that_no_attack_reaches_counts_in_ra_paths_only() -> None:
    model, x = Planted(weak=2).eval(), grey()
    evaluation = evaluate(model, x, torch.zeros(5, dtype=torch.long), epsilon=EPSILON, preset=("pgd_10", "reroute", "paths"))
    assert evaluation.worst == evaluation.sa == 100
    assert evaluation.figures["ra_paths"] == 0
    assert evaluation.attacks["paths"].broken == 0


def test_without_a_weak_pathway_every_image_is_robust() -> None:
    model = Planted(weak=-1).eval()
    evaluation = evaluate(model, grey(), torch.zeros(5, dtype=torch.long), epsilon=EPSILON, preset=("pgd_10", "paths"))
    assert evaluation.figures["ra_paths"] == evaluation.worst == 100


def test_logits_that_are_not_finite_on_a_pathway_count_as_broken() -> None:
    """As in the network itself. The argmax of NaN is 0, the label."""

    class NanExpert(Planted):
        def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, list[Routing]]:
            logits, (routing,) = super().forward_routed(x, gate)
            return logits.where((routing.experts != self.weak)[:, None], torch.nan), [routing]

    model = NanExpert(2).eval()
    evaluation = evaluate(model, grey(), torch.zeros(5, dtype=torch.long), epsilon=EPSILON, preset=("pgd_10", "paths"))
    assert evaluation.worst == 100.0
    assert evaluation.figures["ra_paths"] == 0.0


def test_images_broken_on_the_chosen_pathway_break_the_network() -> None:
    model = Planted(weak=0).eval()
    evaluation = evaluate(model, grey(), torch.zeros(5, dtype=torch.long), epsilon=EPSILON, preset=("paths",))
    assert evaluation.worst == evaluation.figures["ra_paths"] == 0
    assert evaluation.attacks["paths"].broken == 5


@pytest.mark.parametrize(("weak", "broken"), [(3, True), (-1, False)])
def test_x_adv_is_checked_on_all_pathways(weak: int, broken: bool) -> None:
    model = Planted(weak).eval()
    with frozen(model):
        x_adv = attack_pathways(job(model, grey()))
        assert (x_adv - grey()).abs().max() <= EPSILON + 1e-6
        assert broken_on_a_pathway(job(model, grey()), x_adv).tolist() == [broken] * 5
        assert not broken_on_a_pathway(job(model, grey()), grey()).any()


def test_a_network_of_many_pathways_is_attacked_on_the_clean_one_on_cheap_changes_and_on_random_ones() -> None:
    small, large = Planted(weak=1), Layers()
    routes, are_all = pathways(job(small, grey()))
    assert (routes[0].tolist(), are_all) == ([[0], [1], [2], [3]], True)
    x = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    assert num_pathways(large, x) == 128 > PATHWAY_BUDGET
    routes, are_all = pathways(job(large, x))
    assert not are_all
    assert routes.shape == (4, 1 + CHEAPEST + RANDOM, 7)
    clean = (x.flatten(1)[:, :7] < 0.5).long()
    assert torch.equal(routes[:, 0], clean)
    for number in range(CHEAPEST):  # the layer whose two routing logits are closest comes first
        change = (routes[:, 1 + number] != clean).nonzero()
        assert change[:, 0].tolist() == [0, 1, 2, 3]
        nearest = (x.flatten(1)[:, :7] - 0.5).abs().argsort(dim=1)[:, number]
        assert torch.equal(change[:, 1], nearest)
    assert torch.equal(routes, pathways(job(large, x))[0])


def test_sampled_pathways_have_a_separate_name() -> None:
    model = Layers().eval()
    x = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    evaluation = evaluate(model, x, model(x).argmax(dim=1), epsilon=0.01, preset=("paths",))
    assert "ra_paths" not in evaluation.figures
    assert evaluation.figures["ra_paths_sampled"] <= evaluation.worst


def evaluated(budget: int) -> tuple[Evaluation, list[str]]:
    """The evaluation of 16 pathways under a budget, and the names of its figures."""
    x = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    model = Layers(4).eval()
    evaluation = evaluate(
        model, x, model(x).argmax(dim=1), epsilon=0.01, preset=("pgd_10", "paths"), pathway_budget=budget
    )  # fmt: skip
    return evaluation, list(evaluation.figures)


def test_the_budget_decides_which_pathways_are_attacked_and_one_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    for budget, count in ((16, 16), (15, 1 + CHEAPEST + RANDOM)):
        routes, are_all = pathways(replace(job(Layers(4), torch.rand(4, 1, 3, 3)), pathway_budget=budget))
        assert (routes.shape, are_all) == ((4, count, 4), budget == 16)
    assert evaluated(16)[1] == ["ra_10", "ra_paths"]
    assert not caplog.messages
    assert evaluated(15)[1] == ["ra_10", "ra_paths_sampled"]
    assert caplog.messages == [notice(16, 15)]
    assert "16 pathways, more than the budget of 15: 8 of them are tried instead" in caplog.messages[0]
    none, figures = evaluated(0)
    assert figures == ["ra_10"]
    assert none.left_out == {"paths": "the pathway budget is 0, so RA-worst is reported without RA-paths"}
    assert len(caplog.messages) == 1
    with pytest.raises(UserError, match="pathway_budget must be at least 0, not -1"):
        evaluated(-1)


def test_another_budget_runs_only_the_pathways_again(tmp_path: Path) -> None:
    x = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    model, ran = Layers(4).eval(), []
    for budget in (15, 15, 16):
        evaluate(
            model, x, model(x).argmax(dim=1), epsilon=0.01, preset=("pgd_10", "paths"), pathway_budget=budget, store=tmp_path,
            progress=lambda name, number, shard: ran.append(name),
        )  # fmt: skip
    assert ran == ["pgd_10", "paths", "paths"]


def test_pathways_that_are_attacked_together_are_those_of_their_images() -> None:
    routes = torch.arange(6).view(2, 3, 1)  # image 0 has pathways 0, 1 and 2, image 1 has 3, 4 and 5
    assert _one_after_another(routes, range(1, 3)).tolist() == [[1], [4], [2], [5]]


def test_pathways_that_are_attacked_together_break_the_same_images() -> None:
    model = Layers().eval()
    x = torch.rand(12, 1, 3, 3, generator=torch.Generator().manual_seed(3))
    y = model(x).argmax(dim=1)
    broken = []
    for batch_size in (1, 12, 30, 1000):  # one pathway at once, one, two, and all of them
        task = replace(job(model, x), y=y, epsilon=0.03, batch_size=batch_size)
        with frozen(model):
            x_adv = attack_pathways(task)
            broken.append((model(x_adv).argmax(dim=1) != y).tolist())
            assert (x_adv - x).abs().max() <= 0.03 + 1e-6
    assert all(flags == broken[0] for flags in broken)
    assert 0 < sum(broken[0]) < 12

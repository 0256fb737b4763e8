"""AutoAttack under our runner gives the same flags as a direct call of the package."""

from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.attacks import derive_seed, frozen
from advmoe.attacks.autoattack import STANDARD as AUTOATTACK
from advmoe.config import DataConfig
from advmoe.data import load_dataset
from advmoe.evaluation import evaluate

EPSILON, SEED, SHARD = 0.04, 5, 8


def images(classes: int) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST of the first `classes` classes, pooled to 7x7."""
    train = load_dataset(DataConfig(dataset="fashion-mnist")).train
    rows = train.labels < classes
    return F.avg_pool2d(train.pixels()[rows], 4), train.labels[rows]


def tiny_net(classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with one hidden layer, trained for a second, and its training images x and labels y."""
    x, y = images(classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(49, 16), nn.ReLU(), nn.Linear(16, classes))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model.eval(), x, y


def robust_rows_of_package(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> list[int]:
    """The rows that a direct call of the package does not break."""
    suite = AutoAttack(model, norm="Linf", eps=EPSILON, version="standard", device="cpu", seed=seed)
    suite.verbose = False
    with frozen(model):
        x_adv, _ = suite.run_standard_evaluation(x, y, batch_size=len(x))
        return (model(x_adv).argmax(dim=1) == y).nonzero()[:, 0].tolist()


@pytest.mark.usefixtures("short_autoattack")
def test_gives_the_flags_of_the_package_called_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = tiny_net(10)
    x, y = x[:16], y[:16]
    calls, run = set(), AutoAttack.run_standard_evaluation

    def recorded(suite: AutoAttack, *arguments: Any, **options: Any) -> Any:
        calls.add((suite.seed, *suite.attacks_to_run))
        return run(suite, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AutoAttack, "run_standard_evaluation", recorded)
        evaluation = evaluate(model, x, y, epsilon=EPSILON, preset=["autoattack"], seed=SEED, shard_size=SHARD)
    parts = [name.removeprefix("aa_") for name in AUTOATTACK]
    assert calls == {(derive_seed(SEED, shard) % 2**31, part) for shard in range(2) for part in parts}
    broken = {row for rows in evaluation.broken.values() for row in rows}
    ours = [row for row in evaluation.correct if row not in broken]
    expected = [
        first + row
        for number, first in enumerate(range(0, 16, SHARD))
        for row in robust_rows_of_package(
            model, x[first : first + SHARD], y[first : first + SHARD], derive_seed(SEED, number) % 2**31
        )
    ]
    assert ours == expected
    assert 4 <= len(ours) <= 12  # else nothing would be compared
    assert evaluation.figures == {"ra_aa": 100 * len(expected) / 16}
    assert tuple(evaluation.attacks) == AUTOATTACK
    assert evaluation.attacks["aa_square"].attacked == len(ours) + evaluation.attacks["aa_square"].broken


@pytest.mark.usefixtures("short_autoattack")
def test_four_classes_work() -> None:
    """The package's targets assume ten classes."""
    model, x, y = tiny_net(4)
    evaluation = evaluate(model, x[:8], y[:8], epsilon=3 * EPSILON, preset=["autoattack"], seed=SEED)
    assert tuple(evaluation.attacks) == AUTOATTACK
    assert evaluation.sa - evaluation.worst >= 12.5
    assert "ra_aa" in evaluation.figures


@pytest.mark.usefixtures("short_autoattack")
@pytest.mark.parametrize("classes", [2, 3])
def test_with_few_classes_saturated_logits_hide_no_image(classes: int) -> None:
    """A linear network, whose robust images are known, with logits so large that the cross-entropy has no gradient."""
    weights = torch.randn(classes, 36)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, classes, bias=False)).eval()
    model[1].weight.data = 1e5 * (weights - weights.mean(dim=1, keepdim=True))
    x = 0.3 + 0.4 * torch.rand(40, 1, 6, 6)
    with torch.no_grad():
        logits, y = model(x), model(x).argmax(dim=1)
        reach = EPSILON / 4 * (model[1].weight[y][:, None] - model[1].weight).abs().sum(dim=2)  # [n, classes]
        gaps = logits.gather(1, y[:, None]) - logits
    breakable = ((gaps < reach) & (torch.arange(classes) != y[:, None])).any(dim=1).nonzero()[:, 0].tolist()
    evaluation = evaluate(model, x, y, epsilon=EPSILON / 4, preset=["autoattack"], seed=SEED)
    assert 8 <= len(breakable) <= 32
    assert sorted({*evaluation.broken["aa_apgd-ce"], *evaluation.broken["apgd_t"]}) == breakable == evaluation.ever
    assert len(evaluation.broken["apgd_t"]) >= 5

"""Does an independent attack, which shares no code with the evaluation, break images that count as robust? Up to 1 hour per run.

    advmoe train --recipe demo-advmoe --limit-train 600 --epochs 3 --limit-test 300 --out runs/advmoe     (and others)
    advmoe benchmark --suite independent --runs runs/advmoe ... --json independent.json

Every run is evaluated with the presets quick and standard, without the costly self-checks. Results are kept in RUN/independent, so
a call that was stopped can be continued. Then the images that no attack of a preset broke are attacked again: for each wrong class,
the most likely first, 60 steps of sign momentum on the difference of the two logits, through the hard gate.

Shapes: B images, K classes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks import frozen
from advmoe.attacks.presets import PRESETS, RA_FIGURES
from advmoe.benchmark.rows import Row
from advmoe.benchmark.setup import Setup
from advmoe.config.choices import BATCH_SIZE
from advmoe.data import load_dataset
from advmoe.errors import UserError
from advmoe.evaluation import Evaluation, evaluate
from advmoe.evaluation.store import stored_shards
from advmoe.runs.load import load

PGD = tuple(name for names in RA_FIGURES.values() for name in names)
PLANS = {  # lists of the presets' attacks, because a list runs without the costly self-checks
    "quick": tuple(PRESETS["quick"].attacks),
    "standard": (*PGD, "autoattack", *PRESETS["standard"].survivors),
}
TOY_PLANS = {"quick": ("pgd_10",), "standard": ("pgd_10", "apgd_margin_t")}
LIMITS = {"quick": "<= 1.0", "standard": "<= 0.5"}  # percentage points that the independent attack may break beyond each preset
STEPS, MOMENTUM = 60, 0.75
STEP_SIZES = ((0.5, 0.3), (0.85, 0.1), (1.0, 0.02))  # up to this fraction of the steps, this fraction of epsilon


def check(setup: Setup) -> None:
    """Raises UserError if no runs are given."""
    if not setup.runs:
        raise UserError("suite independent attacks trained networks: give --runs RUN ...")


def measure(setup: Setup) -> Iterator[Row]:
    """The rows of every run: accuracies, images that only the independent attack broke, and processor time by attack."""
    for run in setup.runs:
        yield from rows(run, setup.quick)


def rows(run: Path, quick: bool) -> Iterator[Row]:
    """The rows of one run, on the test images of its configuration."""
    model = load(run)
    data = load_dataset(model.config.data.replace(limit_test=10) if quick else model.config.data).test
    x, y, epsilon = data.pixels(), data.labels, model.threat_model.epsilon
    case, worst = f"{run.resolve().name}, {len(y)} images", {}
    for preset, plan in (TOY_PLANS if quick else PLANS).items():
        store = run / "independent" / f"{preset}-{len(y)}"
        evaluation = evaluate(model.network, x, y, epsilon=epsilon, preset=plan, store=store)
        worst[preset] = evaluation.worst
        if preset == "quick":
            yield Row(suite="independent", case=case, what="SA", value=evaluation.sa, unit="%")
        yield Row(suite="independent", case=case, what=f"RA-worst ({preset})", value=evaluation.worst, unit="%")
        broken = _broken_beyond(evaluation, model.network, x, y, epsilon, 2 if quick else STEPS)
        beyond = 100 * broken / len(y)
        what = f"broken by the independent attack beyond {preset}"
        yield Row(suite="independent", case=case, what=what, value=beyond, unit="%", target=LIMITS[preset])
        for attack, seconds in processor_seconds(store).items():
            yield Row(suite="independent", case=case, what=f"processor time, {preset}, {attack}", value=seconds / 60, unit="min")
    gap = worst["quick"] - worst["standard"]
    yield Row(suite="independent", case=case, what="quick - standard", value=gap, unit="%", target="<= 1.0")


def processor_seconds(store: Path) -> dict[str, float]:
    """Attack -> processor seconds, summed over all shards of a store."""
    seconds: dict[str, float] = {}
    for _, shard in stored_shards(store):
        for name, attack in shard.attacks.items():
            seconds[name] = seconds.get(name, 0.0) + (attack.cpu_seconds or 0.0)
    return seconds


def _broken_beyond(evaluation: Evaluation, network: Any, x: Tensor, y: Tensor, epsilon: float, steps: int) -> int:
    """The number of images that the independent attack breaks, among those that no attack of the evaluation broke."""
    survivors = torch.tensor(sorted(set(evaluation.correct) - set(evaluation.ever)), dtype=torch.long)
    with frozen(network):
        return sum(int(broken(network, x[part], y[part], epsilon, steps).sum()) for part in survivors.split(BATCH_SIZE))


def broken(network: Any, x: Tensor, y: Tensor, epsilon: float, steps: int = STEPS) -> Tensor:
    """Which images x [B, C, H, W] the attack breaks: [B] bool. All must be classified correctly before."""
    fooled = torch.zeros(len(x), dtype=torch.bool)
    if not len(x):
        return fooled
    with torch.no_grad():
        logits = network(x)
    classes = logits.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True)[:, :-1]
    for wrong in classes.unbind(dim=1):
        rows = (~fooled).nonzero()[:, 0]
        if len(rows):
            fooled[rows] = _towards(network, x[rows], y[rows], wrong[rows], epsilon, steps)
    return fooled


def _towards(network: Any, x: Tensor, y: Tensor, wrong: Tensor, epsilon: float, steps: int) -> Tensor:
    """Sign momentum on the logit of `wrong` [B] minus that of `y` [B]. Returns which images any step misclassifies, [B] bool."""
    x_adv, velocity, fooled = x, torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool)
    lowest, highest = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    for step in range(steps + 1):
        leaf = x_adv.detach().requires_grad_(True)
        logits = network(leaf)
        fooled |= logits.argmax(dim=1) != y
        if step == steps:
            break
        gain = logits.gather(1, wrong[:, None]) - logits.gather(1, y[:, None])
        (gradient,) = torch.autograd.grad(gain.sum(), leaf)
        velocity = MOMENTUM * velocity + gradient / gradient.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
        size = next(size for share, size in STEP_SIZES if step < share * steps)
        x_adv = (x_adv + epsilon * size * velocity.sign()).clamp(lowest, highest)
    return fooled

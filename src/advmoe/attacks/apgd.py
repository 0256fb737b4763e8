"""Auto-PGD: an ascent that adapts its step size (Croce & Hein 2020, Algorithm 1), untargeted and targeted.

Each image has a separate step size, separate checkpoint decisions and a separate best point. A misclassified image leaves the
batch.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from advmoe.attacks.draws import Draws
from advmoe.attacks.geometry import ascent, check_settings, project, uniform_start
from advmoe.attacks.objectives import Objective, cross_entropy, predicted, targeted_dlr
from advmoe.attacks.pgd import Predict, forward_backward
from advmoe.config.choices import Norm
from advmoe.errors import UserError

MOMENTUM = 0.75  # alpha of Algorithm 1


@dataclass(frozen=True)
class Apgd:
    """Settings of an attack: `epsilon` in pixels of [0, 1], as a distance in `norm`.

    `rho`: the step size is halved if less than this fraction of the steps since the last checkpoint raised the objective.
    `num_targets`: the number of wrong classes that a targeted attack aims at, by default all, but at most 9. It restarts for each.
    """

    epsilon: float
    num_steps: int = 100
    restarts: int = 1
    norm: Norm = "Linf"
    rho: float = 0.75
    num_targets: int | None = None

    def __post_init__(self) -> None:
        check_settings(self.epsilon, self.norm, self.num_steps, self.restarts)
        if not 0 < self.rho <= 1:
            raise UserError(f"rho must be in (0, 1], not {self.rho:g}")


@dataclass(frozen=True)
class NetworkPair:
    """Two networks for one attack: `predict` gives the gradients, and `judge` decides whether a point is misclassified."""

    predict: Predict
    judge: Predict


def apgd(
    predict: Predict | NetworkPair, x: Tensor, target: Tensor, settings: Apgd, draws: Draws, objective: Objective = cross_entropy
) -> Tensor:
    """Images [B, C, H, W] in the ball around `x`: the first misclassified point, or the point with the highest objective.

    `target` is the labels [B] int64, or [B, 2] int64 (label, target class) for a targeted objective. An image counts as
    misclassified if its prediction is not its label, whatever the target. `predict` maps pixels in [0, 1] to logits and should
    be frozen (`frozen(model)`). An image that is misclassified at the start is returned unchanged.
    """
    problem = _problem(predict, settings, objective)
    results, _ = _clean(problem.networks.judge, x, _labels(target))
    for _ in range(settings.restarts):
        _attack(problem, results, x, target, draws)
    return results.x_adv


def targeted_apgd(
    predict: Predict | NetworkPair, x: Tensor, y: Tensor, settings: Apgd, draws: Draws, *, objective: Objective | None = None
) -> Tensor:
    """`apgd` towards each of the `settings.num_targets` most likely wrong classes of `x` [B, C, H, W], one after another.

    y [B] int64. `objective` is targeted, by default `targeted_dlr`. Raises UserError if `num_targets` is less than 1 or more than
    the number of wrong classes.
    """
    problem = _problem(predict, settings, objective or targeted_dlr)
    results, logits = _clean(problem.networks.judge, x, y)
    wrong = logits.shape[1] - 1
    num_targets = min(9, wrong) if settings.num_targets is None else settings.num_targets
    if not 1 <= num_targets <= wrong:
        raise UserError(f"num_targets is {num_targets}: with {wrong + 1} classes there are 1 to {wrong} wrong ones to aim at")
    classes = logits.scatter(1, y[:, None], -torch.inf).topk(num_targets, dim=1).indices
    for aim in classes.unbind(dim=1):
        for _ in range(settings.restarts):
            _attack(problem, results, x, torch.stack([y, aim], dim=1), draws)
    return results.x_adv


def checkpoints(num_steps: int) -> list[int]:
    """The checkpoints: numbers of steps w_j = ceil(p_j * num_steps) > 0 after which step sizes are checked, ascending.

    p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), up to 1. Computed in integer hundredths, without rounding.
    """
    shares = [0, 22]
    while (later := shares[-1] + max(shares[-1] - shares[-2] - 3, 6)) <= 100:
        shares.append(later)
    return sorted({-(-share * num_steps // 100) for share in shares[1:]} - {0})


@dataclass(frozen=True)
class _Problem:
    """What a run maximises: the networks, the objective and the settings."""

    networks: NetworkPair
    settings: Apgd
    objective: Objective

    def evaluate(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whether each point is misclassified [B], its objective [B] and gradient."""
        predict, judge = self.networks.predict, self.networks.judge
        logits, value, gradient = forward_backward(predict, x, target, self.objective)
        judged = logits if judge is predict else judge(x)
        return predicted(judged) != _labels(target), value, gradient


@dataclass
class _Results:
    """The results of the runs so far, for each image of the batch."""

    x_adv: Tensor
    value: Tensor
    broken: Tensor


@dataclass
class _Run:
    """The state of one run, one row per image. Misclassified rows keep their `best`; later steps do not change it."""

    x: Tensor
    target: Tensor
    now: Tensor  # x(k), with its gradient and objective
    gradient: Tensor
    value: Tensor
    before: Tensor  # x(k-1)
    best: Tensor  # x_max, with its gradient and objective; in a misclassified row, the first misclassified point
    best_gradient: Tensor
    best_value: Tensor
    broken: Tensor
    step: Tensor  # eta [B, 1, 1, 1]
    rises: Tensor  # steps since the last checkpoint that raised the objective
    halved: Tensor  # whether the step size was halved at the last checkpoint
    checked_value: Tensor  # f_max at the last checkpoint

    def rows(self, index: Tensor) -> "_Run":
        return _Run(*(getattr(self, field.name)[index] for field in fields(self)))


def _problem(predict: Predict | NetworkPair, settings: Apgd, objective: Objective) -> _Problem:
    networks = predict if isinstance(predict, NetworkPair) else NetworkPair(predict, predict)
    return _Problem(networks, settings, objective)


def _labels(target: Tensor) -> Tensor:
    return target if target.ndim == 1 else target[:, 0]


@torch.no_grad()
def _clean(predict: Predict, x: Tensor, labels: Tensor) -> tuple[_Results, Tensor]:
    """The clean images as first results, with an objective below that of any run, and their logits."""
    logits = predict(x)
    nothing = torch.full(labels.shape, -torch.inf, device=x.device, dtype=torch.promote_types(logits.dtype, torch.float32))
    return _Results(x.clone(), nothing, predicted(logits) != labels), logits


@torch.no_grad()
def _attack(problem: _Problem, results: _Results, x: Tensor, target: Tensor, draws: Draws) -> None:
    """One run on the images that are not misclassified yet. Its results are written to `results`."""
    settings = problem.settings
    index, checked, marks = (~results.broken).nonzero()[:, 0], 0, checkpoints(settings.num_steps)
    if not len(index):
        return
    run = _begin(problem, x[index], target[index], draws.rows(index))
    for done in range(1, settings.num_steps + 1):
        _move(run, problem, 1.0 if done == 1 else MOMENTUM)
        if done in marks:
            _adapt_step(run, settings.rho * (done - checked))
            checked = done
            index, run = _retire(results, index, run)
            if not len(index):
                return
    _retire(results, index, run)


def _begin(problem: _Problem, x: Tensor, target: Tensor, draws: Draws) -> _Run:
    settings = problem.settings
    now = project(uniform_start(x, settings.epsilon, settings.norm, draws), x, settings.epsilon, settings.norm)
    wrong, value, gradient = problem.evaluate(now, target)
    return _Run(
        x, target, now, gradient, value, before=now, best=now, best_gradient=gradient, best_value=value,
        broken=wrong, step=torch.full_like(x[:, :1, :1, :1], 2 * settings.epsilon),
        rises=torch.zeros_like(value), halved=torch.zeros_like(value, dtype=torch.bool), checked_value=value,
    )  # fmt: skip


def _move(run: _Run, problem: _Problem, momentum: float) -> None:
    """x(k) to x(k+1): a projected step plus `1 - momentum` times the last step (Algorithm 1, lines 8 to 14)."""
    epsilon, norm = problem.settings.epsilon, problem.settings.norm
    ahead = project(run.now + run.step * ascent(run.gradient, norm), run.x, epsilon, norm)
    drift = momentum * (ahead - run.now) + (1 - momentum) * (run.now - run.before)
    run.before, run.now, last = run.now, project(run.now + drift, run.x, epsilon, norm), run.value
    wrong, run.value, run.gradient = problem.evaluate(run.now, run.target)
    run.rises = run.rises + (run.value > last)
    _remember(run, wrong)


def _remember(run: _Run, wrong: Tensor) -> None:
    """Keep the new point if it is the row's first misclassified one, or the best one so far of a row without such a point."""
    better = ~run.broken & (wrong | (run.value > run.best_value))
    run.best = _choose(better, run.now, run.best)
    run.best_gradient = _choose(better, run.gradient, run.best_gradient)
    run.best_value = torch.where(better, run.value, run.best_value)
    run.broken = run.broken | wrong


def _adapt_step(run: _Run, enough: float) -> None:
    """Halve the step size and return to the best point where condition 1 or 2 holds.

    Condition 1: too few steps raised the objective. Condition 2: the step size was not halved at the last checkpoint, and the best
    value has not changed since.
    """
    stuck = ~run.halved & (run.best_value == run.checked_value)
    run.halved = (run.rises < enough) | stuck
    run.step = torch.where(run.halved[:, None, None, None], run.step / 2, run.step)
    run.now = _choose(run.halved, run.best, run.now)
    run.gradient = _choose(run.halved, run.best_gradient, run.gradient)
    run.value = torch.where(run.halved, run.best_value, run.value)
    run.rises, run.checked_value = torch.zeros_like(run.rises), run.best_value


def _retire(results: _Results, index: Tensor, run: _Run) -> tuple[Tensor, _Run]:
    """Write the run's results for the images `index`. Returns the index and the run without the misclassified images."""
    better = run.broken | (run.best_value > results.value[index])
    results.x_adv[index[better]] = run.best[better]
    results.value[index[better]] = run.best_value[better].to(results.value)
    results.broken[index] = run.broken
    going = (~run.broken).nonzero()[:, 0]
    return (index, run) if len(going) == len(index) else (index[going], run.rows(going))


def _choose(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(rows[:, None, None, None], yes, no)

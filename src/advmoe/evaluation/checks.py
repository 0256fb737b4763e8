"""Self-checks of an evaluation that run the network or attacks, each with the status pass, warn, fail or skipped.

They follow the recommendations of Carlini et al. (2019) and the warnings of AutoAttack, plus checks for networks that route. A
threshold in percentage points is raised to one image if one image is more than that.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.attacks import ImageDraws, Pgd, derive_seed, evaluation_pgd, frozen, pgd
from advmoe.attacks.objectives import cross_entropy, margin, predicted
from advmoe.attacks.pgd import Predict, input_gradient, pgd_points
from advmoe.attacks.surrogate import UNDECIDED, margins, route_of, undecided
from advmoe.evaluation.precision import full_float32
from advmoe.evaluation.record_evaluation import Check, Status
from advmoe.evaluation.result_checks import NO_ATTACK, threshold
from advmoe.evaluation.shards import is_valid
from advmoe.evaluation.store import Store
from advmoe.evaluation.target import Target
from advmoe.moe import HARD, Routing

CLOSE = 1e-4  # most that the logits of one image may differ in two batches, relative to its largest if that is above 1
POINTS = 0.5  # percentage points by which a robust accuracy may move in the wrong direction
SILENT = 1.0  # percentage of images without a gradient from which the check fails
SUBSET = 128  # number of images for the checks that run attacks
VERSION = 4  # raise it when a check changes; stored checks of another version are run again
COSTLY = {  # number -> name of the checks that only a thorough evaluation runs
    7: "more budget changes nothing", 8: "accuracy falls with epsilon", 9: "iterated and white-box are strongest",
    10: "noise breaks none", 12: "the loss rises",
}  # fmt: skip


def consistency(target: Target) -> Check:
    """(1) Two forward passes, a permuted batch and batches of 1 give the same routes, and the same logits up to CLOSE.

    In another batch, the route of an image may change if the margin of a router is below UNDECIDED. In the same batch, no route
    may change.
    """
    x = target.x
    first, routings = _forward(target, x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(target.seed)).to(x.device)
    repeats = [_logits_and_route(*_forward(target, x)), _logits_and_route(*_forward(target, x[order], order.argsort()))]
    singles = [_logits_and_route(*_forward(target, x[row : row + 1])) for row in range(min(len(x), 16))]
    repeats.append((torch.cat([logits for logits, _ in singles]), torch.cat([route for _, route in singles])))
    _, route = _logits_and_route(first, routings)
    close = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if routings:  # check 13 is for margins that are NaN
        close = undecided(routings) | margins(routings, route).isnan().any(dim=1)
    size = first.abs().amax(dim=1).clamp(min=1)
    worst, moved = torch.zeros(()), 0
    for number, (logits, other_route) in enumerate(repeats):
        differs = other_route != route[: len(other_route)]
        excused = differs.any(dim=1) & close[: len(other_route)] & (number > 0)
        distance = (logits - first[: len(logits)]).abs().amax(dim=1) / size[: len(logits)]
        worst = torch.stack([worst, torch.where(excused, 0, distance).max().cpu()]).max()  # a NaN stays a NaN
        moved += int((differs & ~excused[:, None]).sum())
    detail = f"logits differ by {worst.item():.1e}"
    if target.routed:
        detail += f"; {moved} routes differ; {int(close.sum())} images with a router margin under {UNDECIDED:g}"
        detail += "".join(f" #{row}" for row in close.nonzero()[:10, 0].tolist())
    return Check(1, "same image, same answer", "pass" if worst <= CLOSE and moved == 0 else "fail", detail)


def logits_not_softmax(target: Target) -> Check:
    """(2a) The network returns logits, not probabilities."""
    logits, _ = _forward(target, target.x)
    probabilities = bool((logits >= 0).all() and ((logits.sum(dim=1) - 1).abs() < 1e-3).all())
    detail = f"rows are {'probabilities' if probabilities else 'logits'}"
    return Check(2, "logits, not softmax", "fail" if probabilities else "pass", detail)


def zero_epsilon(target: Target) -> Check:
    """(2b) Robust accuracy at epsilon 0 equals clean accuracy."""
    clean = _is_correct(target, target.x)
    attacked = _robust(target, evaluation_pgd(0.0, 2, target.norm))
    differ = int((clean != attacked).sum())
    return Check(2, "epsilon 0 gives SA", "fail" if differ else "pass", f"{differ} images differ")


def gradients(target: Target) -> Check:
    """(3) The percentage of images whose gradient is zero everywhere or not finite, for the loss and for each router's margin.

    The gradients are those that attacks use, in their precision.
    """
    x, y = target.x, target.y
    (middle,) = _points(target, target.search, evaluation_pgd(target.epsilon, 5, target.norm), _draws(target, 7))
    shares = {}
    for moment, z in (("start", x), ("mid-attack", middle)):
        gradient = target.in_batches(partial(input_gradient, target.search, objective=cross_entropy), z, y)
        shares[f"loss, {moment}"] = _percent(_is_silent(gradient))
        if target.routed:
            silent = target.in_batches(partial(_silent_routers, target), z)
            shares[f"routers, {moment}"] = max(map(_percent, silent.unbind(dim=1)), default=0.0)
    worst = max(shares.values())
    detail = "; ".join(f"{name} {share:.1f} %" for name, share in shares.items()) + " of images without a gradient"
    return Check(3, "gradients are there", "fail" if worst >= SILENT and worst > 100 / len(x) + 1e-9 else "pass", detail)


def budget_suffices(target: Target) -> Check:
    """(7) With 10, 50, 200 steps and 1, 5, 10 restarts, the last increase changes RA by at most half a percentage point."""
    alive, restarts = _is_correct(target, target.x), []
    settings = evaluation_pgd(target.epsilon, 200, target.norm)
    steps = [_percent(flags) for flags in _robust_after(target, settings, (10, 50, 200), among=alive)]
    for number in range(10):
        alive = _robust(target, evaluation_pgd(target.epsilon, 50, target.norm), stream=100 + number, among=alive)
        restarts.append(_percent(alive))
    restarts = [restarts[n - 1] for n in (1, 5, 10)]
    limit = threshold(POINTS, len(target.x))
    late = max(abs(steps[1] - steps[2]), restarts[1] - restarts[2])
    detail = f"10/50/200 steps: {_list(steps)}; 1/5/10 restarts: {_list(restarts)}"
    return Check(7, COSTLY[7], "warn" if late > limit else "pass", detail)


def falls_with_epsilon(target: Target) -> Check:
    """(8) Robust accuracy falls as epsilon grows, to at most 2 % at 8 times the epsilon."""
    factors = (0.5, 1, 2, 4, 8)
    correct = _is_correct(target, target.x)
    robust = [_robust(target, evaluation_pgd(factor * target.epsilon, 20, target.norm), among=correct) for factor in factors]
    accuracies = [_percent(flags) for flags in robust]
    rises = max(b - a for a, b in pairwise(accuracies))
    limit = threshold(POINTS, len(target.x))
    status: Status = "fail" if rises > limit or accuracies[-1] > threshold(2.0, len(target.x)) else "pass"
    return Check(8, COSTLY[8], status, f"at 0.5/1/2/4/8 times epsilon: {_list(accuracies)}")


def iterated_beats_one_step(target: Target) -> Check:
    """(9) An iterated white-box attack is at least as strong as a single step and as an attack transferred from another network.

    An image is robust against each if the network classifies it correctly, clean and attacked.
    """
    clean = _is_correct(target, target.x)
    settings = evaluation_pgd(target.epsilon, 50, target.norm)
    one_step = Pgd(target.epsilon, target.epsilon, 1, start="none", norm=target.norm)
    (one,) = _points(target, target.model, one_step, _draws(target, 8))
    iterated = _robust(target, settings, among=clean)
    accuracies = {"one step": _percent(clean & _is_correct(target, one)), "iterated": _percent(iterated)}
    if target.transfer is not None:
        (transferred,) = _points(target, target.transfer, settings, _draws(target, 9))
        accuracies["transfer"] = _percent(clean & _is_correct(target, transferred))
    limit = threshold(POINTS, len(target.x))
    weaker = max(accuracies["iterated"] - other for name, other in accuracies.items() if name != "iterated")
    detail = ", ".join(f"{name} {value:.1f} %" for name, value in accuracies.items())
    detail += "" if target.transfer is not None else "; no network to transfer from"
    return Check(9, COSTLY[9], "fail" if weaker > limit else "pass", detail)


def noise_breaks_none(target: Target) -> Check:
    """(10) Random points of the ball break none of the images that PGD did not break."""
    alive = _robust(target, evaluation_pgd(target.epsilon, 50, target.norm))
    before = int(alive.sum())
    draws = _draws(target, 10)
    for _ in range(20):
        (z,) = _points(target, target.model, Pgd(target.epsilon, 1.0, 0, norm=target.norm), draws)
        alive &= _is_correct(target, z)
    broken = before - int(alive.sum())
    return Check(10, COSTLY[10], "warn" if broken else "pass", f"20 random points broke {broken} of {before} PGD survivors")


def loss_rises(target: Target) -> Check:
    """(12) The loss rises along the attack."""
    settings = Pgd(target.epsilon, target.epsilon / 4, 20, start="none", norm=target.norm)
    points = [target.x, *_points(target, target.search, settings, _draws(target, 11), (1, 5, 20))]
    losses = [cross_entropy(target.in_batches(target.model, z), target.y).mean().item() for z in points]
    rising = all(b >= a - 0.01 * abs(a) for a, b in pairwise(losses)) and losses[-1] > losses[0]
    return Check(12, COSTLY[12], "pass" if rising else "fail", "after 0/1/5/20 steps: " + ", ".join(f"{v:.3f}" for v in losses))


def finiteness(target: Target) -> Check:
    """(13) Parameters, buffers, logits, routing logits and attack gradients are finite, and no router is constant.

    Logits and routing logits are those of all images; gradients are those of the subset on which the other checks run.
    """
    images = subset(target)
    wrong = [name for name, tensor in _tensors(target.model) if not torch.isfinite(tensor).all()][:3]
    logits, routings = _forward(target, target.x)
    wrong += [] if torch.isfinite(logits).all() else ["logits"]
    for layer, values in enumerate(routing.logits for routing in routings):
        if not torch.isfinite(values).all():
            wrong.append(f"logits of router {layer}")
        elif values.shape[1] > 1 and len(values) > 1 and bool((values == values[:1]).all()):
            wrong.append(f"router {layer} gives every image the same logits")
    for objective in (cross_entropy, margin):
        gradient = images.in_batches(partial(input_gradient, images.search, objective=objective), images.x, images.y)
        wrong += [] if torch.isfinite(gradient).all() else [f"gradient of the {objective.__name__.replace('_', '-')}"]
    detail = f"not finite or constant: {', '.join(wrong)}" if wrong else "all finite, no router constant"
    return Check(13, "numbers are finite", "fail" if wrong else "pass", detail)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in named if tensor.is_floating_point()]


def attack_strength(
    model: Any, x: Tensor, y: Tensor, attack: Callable[[Predict, Tensor, Tensor], Tensor], settings: Pgd, seed: int = 0
) -> Check:
    """Compare another implementation of an attack with this package's PGD, at equal settings.

    `attack(model, x, y)` returns x' for images x [n, C, H, W] in [0, 1] with labels y [n] int64. `settings` are those
    of our PGD; the other attack should use the same.

    Fails if the accuracy under the other attack is more than a percentage point higher. This finds, for example, a projection
    inside the autograd graph: its clamp to [0, 1] removes the gradient of saturated pixels. An x' that is not finite, in [0, 1] and
    in the ball does not count: the image replaces it.
    """
    with frozen(model), full_float32(model), torch.no_grad():
        ours = pgd(model, x, y, settings, ImageDraws(seed, range(len(x))))
        with torch.enable_grad():
            theirs = attack(model, x, y).detach()
        valid = is_valid(theirs, x, settings.epsilon, settings.norm)
        theirs = torch.where(valid[:, None, None, None], theirs, x)
        accuracies = [_percent(predicted(model(z)) == y) for z in (ours, theirs)]
    weaker = accuracies[1] - accuracies[0] > threshold(1.0, len(x))
    detail = f"ours leaves {accuracies[0]:.1f} %, theirs {accuracies[1]:.1f} %"
    detail += "" if valid.all() else f"; {int((~valid).sum())} of theirs outside the ball count as the image"
    return Check(9, "attack as strong as ours", "fail" if weaker else "pass", detail)


CHEAP_CHECKS = (finiteness, consistency, logits_not_softmax, zero_epsilon, gradients)
COSTLY_CHECKS = (budget_suffices, falls_with_epsilon, iterated_beats_one_step, noise_breaks_none, loss_rises)


@torch.no_grad()
def check_network(target: Target, thorough: bool, store: Store) -> list[Check]:
    """The checks that run attacks, on a fixed subset of the images. The costly ones run only if `thorough`, and not at epsilon 0,
    where they have nothing to check. `store` keeps them, and those of earlier evaluations count."""
    known = dict[str, Check]()
    reason = "not in this preset" if not thorough else NO_ATTACK if target.epsilon == 0 else ""
    for run in CHEAP_CHECKS + (() if reason else COSTLY_CHECKS):
        known = _checked(target, run, store)
    done = {check.number for check in known.values()}
    return [*known.values(), *(Check(number, name, "skipped", reason) for number, name in COSTLY.items() if number not in done)]


@torch.no_grad()
def check_finiteness(target: Target, store: Store) -> Check:
    """Check 13, which runs before any attack. `store` keeps it."""
    return _checked(target, finiteness, store)[finiteness.__name__]


def _checked(target: Target, run: Callable[[Target], Check], store: Store) -> dict[str, Check]:
    """All checks that are done, after `run`. It runs only if the store does not have its result."""
    known, name = store.checks(VERSION), run.__name__
    done = [stored for stored in known if stored.split()[0] == name]
    if run is iterated_beats_one_step and (target.transfer_digest or not done):  # a result with one replaces a result without
        name = f"{name} {target.transfer_digest}"
        done = [stored for stored in done if stored == name]
    if not done:
        known = {stored: check for stored, check in known.items() if stored.split()[0] != run.__name__}
        known[name] = run(target if run is finiteness else subset(target))
        store.save_checks(known, VERSION)
    return known


def subset(target: Target) -> Target:
    """The target with only the images that checks attack: at most SUBSET, the same in every evaluation of these images."""
    rows = torch.randperm(len(target.x), generator=torch.Generator().manual_seed(0))[:SUBSET].sort().values.to(target.x.device)
    return replace(target, x=target.x[rows], y=target.y[rows])


def _forward(target: Target, x: Tensor, order: Tensor | None = None) -> tuple[Tensor, Sequence[Any]]:
    passes = [
        target.model.forward_routed(part, HARD) if target.routed else (target.model(part), ())
        for part in x.split(target.batch_size)
    ]
    logits = torch.cat([logits for logits, _ in passes])
    routings = [
        Routing(torch.cat([part.logits for part in parts]), torch.cat([part.experts for part in parts]))
        for parts in zip(*(routings for _, routings in passes), strict=True)
    ]
    if order is None:
        return logits, routings
    return logits[order], [Routing(r.logits[order], r.experts[order]) for r in routings]


def _logits_and_route(logits: Tensor, routings: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Logits [B, classes], and the experts of each layer [B, L]; L is 0 for a network that does not route."""
    return logits, route_of(routings) if routings else torch.zeros_like(logits[:, :0], dtype=torch.long)


def _silent_routers(target: Target, x: Tensor) -> Tensor:
    """Which images have no gradient of the router's margin, for each layer of several experts: [B, L] bool."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        routings = target.search.forward_routed(leaf, HARD)[1]
        gaps = margins(routings, route_of(routings))
        layers = [layer for layer, routing in enumerate(routings) if routing.logits.shape[1] > 1]
        flags = [_is_silent(_gradient(gaps[:, layer].sum(), leaf)) for layer in layers]
    return torch.stack(flags, dim=1) if flags else torch.zeros(len(x), 0, dtype=torch.bool)


def _is_silent(gradient: Tensor) -> Tensor:
    flat = gradient.flatten(1)
    return (flat == 0).all(dim=1) | ~torch.isfinite(flat).all(dim=1)


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    gradient: Tensor = torch.autograd.grad(value, leaf, retain_graph=True, materialize_grads=True)[0]
    return gradient


def _is_correct(target: Target, x: Tensor) -> Tensor:
    """Which images are classified correctly at `x` [B, C, H, W]: [B] bool."""
    return predicted(target.in_batches(target.model, x)) == target.y


def _robust(target: Target, settings: Pgd, stream: int = 12, among: Tensor | None = None) -> Tensor:
    """Which images are classified correctly, clean and under PGD: [B] bool. With `among` [B] bool, only these can be."""
    return _robust_after(target, settings, (settings.num_steps,), stream, among)[0]


def _robust_after(
    target: Target, settings: Pgd, steps: Sequence[int], stream: int = 12, among: Tensor | None = None
) -> list[Tensor]:
    """`_robust` after each number of steps, ascending, from one ascent.

    Only images that are classified correctly are attacked. Gradients come from the faster copy; the network itself decides.
    """
    correct = _is_correct(target, target.x) if among is None else among
    rows = correct.nonzero()[:, 0]
    if not len(rows):
        return [correct.clone() for _ in steps]
    attacked = replace(target, x=target.x[rows], y=target.y[rows])
    points = _points(attacked, target.search, settings, _draws(target, stream).rows(rows), steps)
    return [correct.index_copy(0, rows, _is_correct(attacked, x_adv)) for x_adv in points]


def _points(target: Target, predict: Predict, settings: Pgd, draws: ImageDraws, steps: Sequence[int] | None = None) -> list[Tensor]:
    """`pgd_points` for all images of the target, in batches. By default `settings.num_steps` steps."""
    numbers = torch.arange(len(target.x)).split(target.batch_size)
    parts = [
        pgd_points(predict, x, y, settings, draws.rows(rows), steps or (settings.num_steps,))
        for x, y, rows in zip(target.x.split(target.batch_size), target.y.split(target.batch_size), numbers, strict=True)
    ]
    return [torch.cat(points) for points in zip(*parts, strict=True)]


def _draws(target: Target, stream: int) -> ImageDraws:
    return ImageDraws(derive_seed(target.seed, stream), range(len(target.x)))


def _percent(flags: Tensor) -> float:
    return 100 * int(flags.sum()) / len(flags)  # in float32 one image of 30 would be more than 100 / 30


def _list(values: Sequence[float]) -> str:
    return "/".join(f"{value:.1f}" for value in values) + " %"

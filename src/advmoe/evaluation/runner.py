"""`evaluate`: the accuracy of a network under attack. It works for the networks of this package and for any other."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from advmoe.attacks import Norm, frozen, pathways
from advmoe.attacks.presets import Preset, resolve
from advmoe.attacks.registry import ATTACKS
from advmoe.config.choices import BATCH_SIZE, PATHWAY_BUDGET, SHARD_SIZE
from advmoe.entries import check_kind
from advmoe.errors import UserError
from advmoe.evaluation.checks import check_finiteness, check_network
from advmoe.evaluation.claim import claimed
from advmoe.evaluation.figures import summarise
from advmoe.evaluation.precision import full_float32
from advmoe.evaluation.record_evaluation import Check
from advmoe.evaluation.result_checks import check_results
from advmoe.evaluation.results import Evaluation
from advmoe.evaluation.shards import Worker
from advmoe.evaluation.store import Store, split
from advmoe.evaluation.target import EvaluationOptions, OnAttack, Target, ignore, make_target, routed_inside, store_key

logger = logging.getLogger("advmoe")


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    norm: Norm = "Linf",
    preset: str | Sequence[str] = "standard",
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    store: str | Path | None = None,
    part: tuple[int, int] = (0, 1),
    transfer: nn.Module | None = None,
    bf16_search: bool = False,
    save_adversarial: bool = False,
    progress: OnAttack = ignore,
    batch_size: int = BATCH_SIZE,
    pathway_budget: int = PATHWAY_BUDGET,
) -> Evaluation:
    """Attack `model` on images x [n, C, H, W] in [0, 1] with labels y [n].

    `model` maps pixels to logits. If it also has `forward_routed` (see `advmoe.attacks.surrogate.Routed`), its routing is
    attacked too.

    - `epsilon`: radius of the ball in pixels of [0, 1], as a distance in `norm`.
    - `preset`: a name of `advmoe.evaluation.PRESETS`, or a list of attacks.
    - `seed`: seed of the attacks' random numbers.
    - `shard_size`: number of images whose results are kept together. Survivors are collected over a shard.
    - `store`: a folder that keeps the results after every attack on a shard. Stored attacks are not run again.
    - `part`: (i, k) runs only every k-th shard, starting at i. The figures are then those of these shards' images, without checks;
      with fewer than k shards, some parts have no image.
    - `transfer`: a network to transfer attacks from.
    - `bf16_search`: attacks may compute gradients in bfloat16. Whether an image fools is always decided in float32.
    - `save_adversarial`: write x' to the store.
    - `progress`: called after every attack on a shard, with the attack's name, the shard's number and the shard.
    - `batch_size`: largest number of images attacked at once.
    - `pathway_budget`: number of pathways up to which the attack `paths` tries all of them. If a network has more, it tries some
      of them; with 0, the attack is not run.

    With two or three classes, attacks of this package replace those of AutoAttack and AutoAttack plus that need more. Their figures
    are then `ra_aa_few_classes` and `ra_aa_plus_few_classes` instead of `ra_aa` and `ra_aa_plus`.

    Raises UserError if pixels are outside [0, 1], if labels are out of range, if the network has fewer than 2 classes, returns NaN
    or routes in a way that attacks would miss (`advmoe.moe.check_routings`), if `transfer` has another number of classes, if no
    attack of the preset can run, if the store holds results of another network, data, threat model or seed, if another process
    evaluates the same shards of the store, or if x' should be written without a store.
    """
    options = EvaluationOptions(
        epsilon, norm, preset, seed, shard_size, None if store is None else Path(store), part, transfer, bf16_search,
        save_adversarial, progress, batch_size, pathway_budget,
    )  # fmt: skip
    with claimed(options.store, options.part):
        return evaluate_claimed(model, x, y, options)


def evaluate_claimed(model: nn.Module, x: Tensor, y: Tensor, options: EvaluationOptions) -> Evaluation:
    """What `evaluate` does with these `options`, for a caller that has claimed their store (`advmoe.evaluation.claim`)."""
    if options.save_adversarial and options.store is None:
        raise UserError("save_adversarial needs a store, the folder to which the images are written")
    with _prepared(model, x, y, options) as (target, preset, store):
        images = None if options.store is None else options.store / "adversarial"
        shards = []
        for number, rows in list(enumerate(split(len(x), options.shard_size)))[options.part[0] :: options.part[1]]:
            shards.append(store.load(number, rows))
            save = store.saver(number)
            Worker(target, shards[-1], number, save, options.progress, images, options.save_adversarial).run(preset)
        evaluation = summarise(target, preset, shards)
        if options.part[1] > 1:
            return evaluation
        checks = check_network(target, preset.checks, store) + check_results(shards, evaluation, options.epsilon)
        return replace(evaluation, checks=sorted(checks, key=lambda check: check.number))


def warn_before(model: nn.Module, x: Tensor, y: Tensor, options: EvaluationOptions) -> None:
    """Log the warnings that `evaluate` gives before its attacks, for a caller that leaves the attacks to other processes."""
    with _prepared(model, x, y, options):
        pass


@contextmanager
def _prepared(model: nn.Module, x: Tensor, y: Tensor, options: EvaluationOptions) -> Iterator[tuple[Target, Preset, Store]]:
    """The network, frozen, as a Target; the preset for its number of classes; the store. Gives the
    warnings first, unless the options say quiet."""
    check_kind("the network", model, nn.Module)
    if options.transfer is not None:
        check_kind("the network to transfer from", options.transfer, nn.Module)
    requested, model = resolve(options.preset), routed_inside(model)
    if model.training:
        logger.warning("the model is in train mode: it is evaluated in eval mode, then restored")
    with frozen(model), frozen(nn.Identity() if options.transfer is None else options.transfer), full_float32(model):
        target = make_target(model, x, y, options)
        preset = requested.for_classes(target.num_classes)
        _check_preset(target, preset)
        store = Store(options.store, store_key(target, options.shard_size))
        check = check_finiteness(target, store)  # before the attacks, whose figures could not be trusted
        if not options.quiet:
            _warn(target, preset, check)
        yield target, preset, store


def check_attacks(model: nn.Module, x: Tensor, y: Tensor, options: EvaluationOptions) -> None:
    """Raises UserError if no attack of the options can run on the network. One image in x [n, C, H, W] is enough."""
    requested, model = resolve(options.preset), routed_inside(model)
    with frozen(model):
        target = make_target(model, x, y, options)
        _check_preset(target, requested.for_classes(target.num_classes))


def _warn(target: Target, preset: Preset, finiteness: Check) -> None:
    """Warn of routing that attacks cannot reach, of more pathways than the budget, and of numbers that are not finite."""
    if target.hides_routing:
        logger.warning(
            "the network contains one that routes but has no forward_routed: attacks on its routing are not run, and the "
            "evaluation is incomplete"
        )
    sampled = pathways.notice(target.num_pathways, target.pathway_budget)
    if sampled and "paths" in preset.attacks:
        logger.warning(sampled)
    if finiteness.status == "fail":
        logger.warning("check 13 fails (%s): the accuracies below cannot be trusted", finiteness.detail)


def _check_preset(target: Target, preset: Preset) -> None:
    reasons = [ATTACKS[name].obstacle(target.setting) for name in preset.attacks]
    if all(reasons):
        raise UserError(f"nothing can be run of {', '.join(preset.attacks)}: {'; '.join(dict.fromkeys(reasons))}")

"""The only training loop."""

import logging
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from advmoe import distributed
from advmoe.attacks import derive_seed
from advmoe.config import RunConfig
from advmoe.data import Images, Splits, with_generated
from advmoe.data.generated import MixedImages
from advmoe.training.batches import batches
from advmoe.training.checkpoint import RunFolder
from advmoe.training.checks import check
from advmoe.training.dispatch import set_fastest
from advmoe.training.groups import groups_of, new_groups
from advmoe.training.health import NonFinite, collapsed_routers, router_cosines
from advmoe.training.interrupts import Interrupts
from advmoe.training.manifest import History
from advmoe.training.methods import Phase, total_epochs
from advmoe.training.observers import Observer
from advmoe.training.resume import check_unchanged, claimed
from advmoe.training.run import Run, check_finite
from advmoe.training.schedule import rates, set_rates
from advmoe.training.start import initial_network, network
from advmoe.training.statistics import calibrate_routers
from advmoe.training.steps import TrainState
from advmoe.training.teacher import load_teacher
from advmoe.training.totals import Totals, Value, check_metrics, means
from advmoe.training.trial import compilable
from advmoe.training.validation import validate

log = logging.getLogger("advmoe")


def train(config: RunConfig, splits: Splits, out: Path, *observers: Observer, resume: bool = False) -> History:
    """Train the run `config` in the folder `out`, from its last checkpoint if there is one, and return its history.

    `splits` are on the training device. Each of several ranks trains on its share of every batch; only rank 0 touches the
    folder and calls the observers. SIGTERM and SIGINT end training after the current step, with a checkpoint, and raise Stopped.
    Raises UserError if the configuration does not fit the data, if the folder holds another run, if another process trains there,
    or if a loss, logit or gradient is not finite (the last good checkpoint is kept).
    """
    folder, device = RunFolder(out), splits.train.labels.device
    latest = distributed.on_rank_zero(folder.latest)
    if latest is not None and latest.epoch >= total_epochs(config):  # its teacher and generated images may be gone
        with claimed(folder, config, splits, resume=True):
            return latest.history
    distributed.raise_together(lambda: check(config, splits))
    splits = with_generated(splits, config.data)
    teacher = distributed.raise_together(lambda: load_teacher(config, splits))
    model = distributed.raise_together(
        lambda: initial_network(config, splits) if latest is None else network(config, splits.spec).to(device)
    )
    fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with fork, claimed(folder, config, splits, resume) as latest, Interrupts() as interrupts:
        config = compilable(config, model, splits.spec)
        set_fastest(config, out, model, splits.spec)
        digests = {} if teacher is None else {"teacher": teacher.digest}
        if isinstance(splits.train, MixedImages):
            digests["generated"] = splits.train.digest
        run = Run(config, splits, folder, model, interrupts, observers if distributed.rank() == 0 else (), latest, digests)
        for observer in run.observers:
            observer.begin()
        check_unchanged(config, digests, run.last_row)
        while not run.is_done:
            number = run.phase_number
            phase, state = run.phases[number], run.begin_phase()
            state.teacher = teacher
            try:
                while run.phase_number == number:
                    figures = train_epoch(run, state, phase)
                    for copy in [model, *([state.ema.model] if state.ema else [])]:
                        distributed.broadcast_state(copy)  # without sync_norm the ranks' running statistics differ
                        if config.training.router_statistics == "plain":
                            calibrate_routers(copy, config, splits.train)
                    run.finish_epoch(state, figures | validate(state, splits.val))
            except NonFinite as error:
                run.recover(error, state)
    return run.history


def train_epoch(run: Run, state: TrainState, phase: Phase) -> dict[str, Value]:
    """One pass over the training set, or the part of it that remains. Returns the epoch's figures."""
    config, images, epoch = run.config, run.splits.train, len(run.history)
    iterations = math.ceil(len(images) / config.training.batch_size)
    totals = run.begin_epoch(iterations)
    state.groups = groups_of(run.history, images.labels.device)
    loaded = batches(config, images, epoch, len(phase.levels), totals.iteration)
    for iteration in range(totals.iteration, iterations):
        state.iteration = epoch * iterations + iteration
        state.done = (run.epochs_of_phase + iteration / iterations) / config.training.epochs
        set_rates(state, 0.5**run.restores)
        state.draws.generator.manual_seed(derive_seed(config.seed, epoch, iteration))
        torch.manual_seed(derive_seed(config.seed, epoch, iteration, distributed.rank()))  # of dropout and gates with noise
        if distributed.world_size() > 1:
            state.draws.batch = min(config.training.batch_size, len(images) - iteration * config.training.batch_size)
        try:
            _iterate(state, phase, loaded, totals)
        except NonFinite as error:
            raise NonFinite(f"iteration {iteration + 1} of {iterations}: {error} is not finite") from None
        run.finish_iteration(state, totals, iterations)
    sums, image_counts = totals.over_ranks()
    for router, expert, share in collapsed_routers(sums["load"]) if "load" in sums else []:
        log.warning("epoch %d: router %d sends %.0f%% of the images to expert %d", epoch + 1, router, 100 * share, expert)
    figures = means(sums, image_counts)
    check_finite(state, figures)
    row: dict[str, Value] = {
        "epoch": epoch + 1, **rates(state), **figures, "train_seconds": totals.seconds, "iterations": iterations, **run.code,
    }  # fmt: skip
    of_features = state.model.routers() if state.model.router is None else []  # a network router computes its features itself
    if of_features and (cosines := router_cosines(state.model, network(config, run.splits.spec))):
        row["router_cosine"] = cosines
    row |= run.digests
    return row | new_groups(config, [*run.history, row])


def _iterate(state: TrainState, phase: Phase, loaded: Iterator[tuple[Images, ...]], totals: Totals) -> None:
    """One step of the phase on the next batches, one for each level."""
    drawn = distributed.raise_together(partial(next, loaded))
    by_level = {level: (batch.pixels(), batch.labels) for level, batch in zip(phase.levels, drawn, strict=True)}
    state.rows = {by_level[level][0]: batch.rows for level, batch in zip(phase.levels, drawn, strict=True)}
    metrics = phase.step(state, by_level)
    check_metrics(metrics, state.config.method)
    totals.add(metrics, len(drawn[0]))
    if state.ema is not None:
        state.ema.update(state.model)

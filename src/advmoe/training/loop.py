"""The only training loop."""

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from advmoe import distributed
from advmoe.attacks import Pgd, derive_seed
from advmoe.config import RunConfig
from advmoe.data import Source, Splits
from advmoe.errors import UserError
from advmoe.evaluation.accuracy import correct_flags, evaluation_step, robust_flags
from advmoe.models import Classifier
from advmoe.moe import synchronise
from advmoe.training.batches import epoch_order
from advmoe.training.checkpoint import Checkpoint, History, Partial, RunFolder, load_weights
from advmoe.training.health import NonFinite, collapsed_layers
from advmoe.training.interrupts import Interrupts, Stopped
from advmoe.training.methods import METHODS, Phase
from advmoe.training.start import autocast, batches, calibrate, initial_network, network, train_state
from advmoe.training.steps import Metrics, TrainState

VALIDATION_STEPS = 10
MOST_RESTORES = 3
OWN = ("fused", "initial_lr", "warmup", "routers")  # what a phase gives its optimizers' groups, by the configuration and device


class Listener(Protocol):
    """Who is told how a run goes."""

    def iteration(self, epoch: int, done: int, total: int, sums: Metrics, images: int) -> None:
        """After every iteration, with the epoch's sums so far."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """After every epoch, with its line of metrics.jsonl."""

    def note(self, text: str) -> None:
        """A warning or remark."""


class Quiet:
    """A Listener that keeps it to itself."""

    def iteration(self, epoch: int, done: int, total: int, sums: Metrics, images: int) -> None: ...

    def epoch(self, row: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...


def train(config: RunConfig, splits: Splits, out: Path, listener: Listener, *, resume: bool = False) -> History:
    """Train the run `config` in the folder `out`, from its last checkpoint if there is one; give its history.

    `splits` lie on the training device. Of several ranks each trains on its share of every batch, and rank 0 alone touches the
    folder and calls `listener`. SIGTERM and SIGINT end training after the step in hand, with a checkpoint, as Stopped. Raises
    UserError where the folder holds another run or another process trains there, and on a non-finite loss, logit or gradient
    (the last good checkpoint stays).
    """
    folder, device = RunFolder(out), splits.train.labels.device
    fresh = distributed.on_rank_zero(folder.latest) is None
    model = initial_network(config, splits) if fresh else network(config, splits.spec).to(device)
    _check_sizes(config, splits)
    autocast(config, device)  # refuses what the device lacks before there is a folder
    with contextlib.ExitStack() as stack:
        latest = distributed.on_rank_zero(lambda: _opened(stack, folder, config, splits, listener, resume))
        run = _Run(
            config, splits, folder, listener if distributed.rank() == 0 else Quiet(), model, stack.enter_context(Interrupts())
        )
        run.go_back(latest)
        phases, epochs = METHODS[config.method].phases, config.training.epochs
        while len(run.history) < len(phases) * epochs:
            number = len(run.history) // epochs
            run.phase(phases[number], number * epochs)
    return run.history


def _opened(
    stack: contextlib.ExitStack, folder: RunFolder, config: RunConfig, splits: Splits, listener: Listener, resume: bool
) -> Checkpoint | None:
    """Lock and claim the folder, and put it in order; give the checkpoint to go on from."""
    again = distributed.restart_count() > 0 and folder.was_claimed_by(distributed.launch_id())
    if resume and not folder.config_path.exists():
        listener.note(f"{folder.path} holds no run yet: training starts anew")
    stack.enter_context(folder.locked())
    folder.claim(config, resume or again or _finished(folder, config))
    folder.sign(distributed.launch_id())
    folder.clean()
    latest = folder.latest()
    for name in folder.damaged():
        where = f"{latest.folder.name} is used" if latest else "training starts anew"
        listener.note(f"checkpoint {name} is cut short or altered; {where}")
    if latest is not None and latest.fingerprint != splits.fingerprint:
        raise UserError(f"{folder.path}: was trained on data with fingerprint {latest.fingerprint}, not {splits.fingerprint}")
    if latest is not None:
        folder.prune(latest.history, latest.folder)
    if latest is not None and latest.history:
        folder.write_metrics(latest.history)
    return latest


def _finished(folder: RunFolder, config: RunConfig) -> bool:
    latest = folder.latest() if folder.config_path.exists() else None
    return latest is not None and latest.epoch >= len(METHODS[config.method].phases) * config.training.epochs


def _check_sizes(config: RunConfig, splits: Splits) -> None:
    size, images, processes = config.training.batch_size, len(splits.train), distributed.world_size()
    last = images % size or size
    least = 2 if processes == 1 else processes if config.training.sync_norm else 2 * processes
    if last < least:
        few = "one" if last == 1 else str(last)
        whom = "" if processes == 1 else f" of {processes} processes"
        raise UserError(f"batch_size {size} leaves {few} of {images} images for the last batch: too few for batch norm{whom}")
    if len(splits.val) < processes:
        raise UserError(f"{len(splits.val)} held-out images are too few for {processes} processes")
    for phase in METHODS[config.method].phases:
        epoch_order(0, 0, len(phase.levels), images, size)


@dataclass
class _Run:
    """A run under way, and what is done of it."""

    config: RunConfig
    splits: Splits
    folder: RunFolder
    listener: Listener
    model: Classifier
    interrupts: Interrupts
    history: History = field(default_factory=list)
    latest: Checkpoint | None = None
    """Where the next epoch starts from, where that is not the state in memory."""
    restores: int = 0

    def go_back(self, latest: Checkpoint | None) -> None:
        """Go on from a checkpoint, or from the start."""
        self.latest, self.history = latest, list(latest.history) if latest else []
        self.restores = max(self.restores, latest.restores if latest else 0)

    def phase(self, phase: Phase, before: int) -> None:
        """The epochs `before` + 1 to `before` + training.epochs that are not in the history yet, or those up to a NaN."""
        state = self._begun(phase, before)
        while len(self.history) < before + self.config.training.epochs:
            try:
                row = self._epoch(state, phase, len(self.history) - before)
            except NonFinite as error:
                self._recover(error)
                return
            distributed.broadcast_state(self.model)  # without sync_norm each rank's statistics are its own
            row |= _validate(state, self.splits.val) | {"phase": 1 + before // self.config.training.epochs}
            row["score"] = row[METHODS[self.config.method].selects]
            self.history.append(distributed.broadcast(row))
            self._save(state)
            self.listener.epoch(row)
            caught = distributed.maximum(self.interrupts.caught)
            if caught and not self._is_done():
                raise Stopped(caught, f"after epoch {len(self.history)}, which is saved")

    def _is_done(self) -> bool:
        return len(self.history) == len(METHODS[self.config.method].phases) * self.config.training.epochs

    def _begun(self, phase: Phase, before: int) -> TrainState:
        """The state of a phase, as the checkpoint has it that the run goes on from."""
        state, latest = train_state(self.config, self.model, phase), self.latest
        synchronise(self.model, False)
        if latest is not None:
            within = latest.epoch > before or latest.partial is not None
            _restore(state, latest, within_phase=within)
        elif before == 0:
            distributed.broadcast_state(self.model)
            calibrate(state, self.splits.train)
        synchronise(self.model, distributed.world_size() > 1 and self.config.training.sync_norm)
        return state

    def _epoch(self, state: TrainState, phase: Phase, progress: int) -> dict[str, Any]:
        """One pass over the training set, or what is left of it; `progress` counts the phase's epochs from 0."""
        training, epoch, images = self.config.training, len(self.history), self.splits.train
        done = _Done.of(self.latest.partial if self.latest else None)
        self.latest = None
        loaded = batches(self.config, images, epoch, len(phase.levels), done.iteration)
        total = math.ceil(len(images) / training.batch_size)
        if done.iteration > total:
            raise UserError(f"{self.folder.path}: its checkpoint is {done.iteration} iterations into an epoch of {total}")
        for iteration in range(done.iteration, total):
            state.done = (progress + iteration / total) / training.epochs
            _set_rates(state, 0.5**self.restores)
            state.draws.generator.manual_seed(derive_seed(self.config.seed, epoch, iteration))
            if distributed.world_size() > 1:
                state.draws.batch = min(training.batch_size, len(images) - iteration * training.batch_size)
            drawn = distributed.raise_together(lambda: next(loaded))
            own = {level: (batch.pixels(), batch.labels) for level, batch in zip(phase.levels, drawn, strict=True)}
            try:
                done.add(phase.step(state, own), len(own[phase.levels[0]][1]))
            except NonFinite as error:
                raise NonFinite(f"iteration {iteration + 1} of {total}: {error} is not finite") from None
            where = f"epoch {epoch + 1}, iteration {iteration + 1} of {total}"
            try:
                self.listener.iteration(epoch + 1, iteration + 1, total, done.sums, done.images)
            except OSError:  # a pipe whose reader the signal ended, too
                self._save_if_wanted(state, done, where)
                raise
            self._save_if_wanted(state, done, where)
        sums, seen = done.over_ranks()
        row = {"epoch": epoch + 1, **_rates(state), **_means(sums, seen)}
        for layer, expert, share in collapsed_layers(sums["load"]) if "load" in sums else []:
            self.listener.note(f"epoch {epoch + 1}: expert {expert} of MoE layer {layer} takes {share:.0%} of the images")
        return row | {"train_seconds": done.seconds, "iterations": total}

    def _recover(self, error: NonFinite) -> None:
        """Go back to the last good checkpoint, where the configuration says so; else raise UserError."""
        epoch, latest = len(self.history) + 1, distributed.on_rank_zero(self.folder.latest)
        last = f"{latest.folder.name} in {self.folder.checkpoint_path}" if latest else "none yet"
        back, rate = last if latest else "the start", "the routers' rate" if self.model.router_parameters() else "the rate"
        if self.config.training.on_nonfinite == "stop" or self.restores == MOST_RESTORES:
            again = f" (after {self.restores} restores)" if self.restores else ""
            raise UserError(f"epoch {epoch}: {error}{again}; last good checkpoint: {last}") from None
        self.restores += 1
        self.listener.note(f"epoch {epoch}: {error}; back to {back}, with half {rate} ({self.restores} of {MOST_RESTORES})")
        self.go_back(latest)
        if latest is None:
            self.model.load_state_dict(initial_network(self.config, self.splits).state_dict())

    def _save_if_wanted(self, state: TrainState, done: "_Done", where: str) -> None:
        """A checkpoint within the epoch, where the last one is older than the configuration wants, or a signal was caught."""
        due = done.unsaved() >= 60 * self.config.runtime.save_minutes
        wanted = distributed.maximum(self.interrupts.caught or int(due))  # no signal that is caught has the number 1
        if wanted:
            self._save(state, done)
        if wanted > 1:
            raise Stopped(wanted, f"after {where}, which is saved")

    def _save(self, state: TrainState, done: "_Done | None" = None) -> None:
        """Keep the state after an epoch, or within one."""
        optimizers = {level: optimizer.state_dict() for level, optimizer in state.optimizers.items()}
        partial = None if done is None else done.partial()
        distributed.on_rank_zero(
            lambda: self.folder.save(
                state.model.state_dict(),
                optimizers,
                self.history,
                self.splits.fingerprint,
                self.splits.spec,
                partial,
                self.restores,
            )
        )


class _Done:
    """What is behind of an epoch."""

    def __init__(self, iteration: int, images: int, seconds: float, sums: Metrics) -> None:
        self.iteration, self.images, self.sums = iteration, images, sums
        self._before, self._started = seconds, time.perf_counter()
        self._saved = self._started

    @classmethod
    def of(cls, partial: Partial | None) -> "_Done":
        """As a checkpoint has it: each rank goes on with its own sums, or rank 0 with all, where there were more or fewer."""
        if partial is None:
            return cls(0, 0, 0.0, {})
        whole = {name: torch.tensor(value) for name, value in {"": partial.images, **partial.sums}.items()}
        if len(partial.images) == distributed.world_size():
            sums = {name: value[distributed.rank()] for name, value in whole.items()}
        else:
            sums = {name: value.sum(dim=0) * (distributed.rank() == 0) for name, value in whole.items()}
        return cls(partial.iteration, int(sums.pop("")), partial.seconds, sums)

    @property
    def seconds(self) -> float:
        """Wall time of the iterations."""
        return self._before + time.perf_counter() - self._started

    def unsaved(self) -> float:
        """Seconds since the last checkpoint, or since the start."""
        return time.perf_counter() - self._saved

    def add(self, metrics: Metrics, images: int) -> None:
        """Count an iteration."""
        self.sums = {name: self.sums.get(name, torch.zeros_like(value)).to(value.device) + value for name, value in metrics.items()}
        self.iteration, self.images = self.iteration + 1, self.images + images

    def over_ranks(self) -> tuple[Metrics, int]:
        """The sums and the number of images of all ranks."""
        seen = next(iter(self.sums.values())).new_tensor(self.images, dtype=torch.int64)
        return {name: distributed.sum_over_ranks(value) for name, value in self.sums.items()}, int(distributed.sum_over_ranks(seen))

    def partial(self) -> Partial:
        """As a checkpoint keeps it."""
        images = distributed.all_gather(next(iter(self.sums.values())).new_tensor(self.images, dtype=torch.int64))
        sums = {name: distributed.all_gather(value).tolist() for name, value in self.sums.items()}
        self._saved = time.perf_counter()
        return Partial(self.iteration, images.tolist(), self.seconds, sums)


def _restore(state: TrainState, checkpoint: Checkpoint, within_phase: bool) -> None:
    """Weights, and the optimizers' states unless the checkpoint ends the phase before."""
    distributed.on_rank_zero(lambda: load_weights(state.model, checkpoint))
    distributed.broadcast_state(state.model)
    states = distributed.on_rank_zero(checkpoint.optimizer_states) if within_phase else {}
    if within_phase and states.keys() != state.optimizers.keys():
        raise UserError(f"{checkpoint.folder}: holds the states of {', '.join(states)}, not of {', '.join(state.optimizers)}")
    for level, content in states.items():
        optimizer = state.optimizers[level]
        ours = [{name: group[name] for name in OWN} for group in optimizer.param_groups]
        _load(optimizer, content, f"{checkpoint.folder}: holds another run's states of level {level}")
        for group, own in zip(optimizer.param_groups, ours, strict=True):
            group.update(own)  # whatever the device, or older version, that wrote the checkpoint


def _load(optimizer: torch.optim.Optimizer, content: dict[str, Any], complaint: str) -> None:
    """Raises UserError, with `complaint`, where `content` is no state of this optimizer."""
    try:
        optimizer.load_state_dict(content)
        fits = all(value.shape == parameter.shape for parameter, own in optimizer.state.items() for value in own.values())
    except Exception as error:  # a state that is none raises nearly anything
        raise UserError(f"{complaint} ({type(error).__name__})") from None
    if not fits:
        raise UserError(f"{complaint} (of other shapes)")


def _set_rates(state: TrainState, lowered: float) -> None:
    """Cosine decay, after a linear rise where the group has one. After a NaN the routers' rate is `lowered`, or all are where
    no router learns."""
    groups = [group for optimizer in state.optimizers.values() for group in optimizer.param_groups]
    routed = any(group["routers"] for group in groups)
    for group in groups:
        rise = min(1.0, state.done / group["warmup"]) if group["warmup"] else 1.0
        rise *= lowered if group["routers"] or not routed else 1.0
        group["lr"] = rise * group["initial_lr"] * 0.5 * (1 + math.cos(math.pi * state.done))


def _rates(state: TrainState) -> dict[str, float]:
    """The last rates: `lr` of what is learned, `router_lr` of the routers beside it."""
    groups = [group for optimizer in state.optimizers.values() for group in optimizer.param_groups]
    return {"router_lr" if group["routers"] else "lr": group["lr"] for group in groups}


def _means(sums: Metrics, images: int) -> dict[str, Any]:
    """Per-image means as plain numbers; correct counts in percent, `load` as each expert's share, `dead` experts by layer."""
    row: dict[str, Any] = {}
    for name, value in sums.items():
        if name == "router_images":
            continue
        if name == "load":
            row["load"] = (value / value.sum(dim=1, keepdim=True)).tolist()
            row["dead"] = [(counts == 0).nonzero()[:, 0].tolist() for counts in value]
        elif name == "router_entropy":
            row[name] = (value / images).tolist()
        elif name.endswith("_correct"):
            row[f"train_{name.removesuffix('_correct')}"] = 100 * value.item() / images
        else:
            row[name] = (value / sums.get(name.replace("loss", "images"), images)).item()
    return row


def _validate(state: TrainState, held_out: Source) -> dict[str, Any]:
    """SA and RA (PGD-10) on the held-out part: they select the best epoch. Each rank attacks its share."""
    started, epsilon = time.perf_counter(), state.config.attack.epsilon
    settings = Pgd(epsilon, evaluation_step(epsilon), VALIDATION_STEPS)
    rows = torch.arange(distributed.rank(), len(held_out), distributed.world_size())
    model, own = state.twin(), held_out.subset(rows.to(held_out.labels.device))
    with torch.inference_mode():
        correct = correct_flags(model, own)
    robust = robust_flags(model, own, settings, correct=correct, numbers=rows.tolist())
    sa, ra = (100 * distributed.sum_over_ranks(flags.sum()).item() / len(held_out) for flags in (correct, robust))
    return {"val_sa": sa, "val_ra": ra, "validate_seconds": time.perf_counter() - started}

"""The only training loop."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from advmoe.attacks import BatchDraws, Pgd, derive_seed
from advmoe.config import RunConfig
from advmoe.data import Pictures, PictureSpec, Splits, augment
from advmoe.errors import UserError, lookup
from advmoe.evaluation.accuracy import accuracy, correct_flags, evaluation_step, robust_flags
from advmoe.models import Classifier, build_model
from advmoe.training.batches import epoch_order
from advmoe.training.checkpoint import Checkpoint, History, RunFolder, load_weights
from advmoe.training.health import NonFinite, collapsed_layers
from advmoe.training.losses import LOSSES
from advmoe.training.methods import LEVELS, METHODS, Phase
from advmoe.training.steps import Batch, Metrics, TrainState

CALIBRATION_BATCHES = 8
VALIDATION_STEPS = 10


class Listener(Protocol):
    """Who is told how a run goes."""

    def iteration(self, epoch: int, done: int, total: int, sums: Metrics, pictures: int) -> None:
        """After every iteration, with the epoch's sums so far."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """After every epoch, with its line of metrics.jsonl."""

    def note(self, text: str) -> None:
        """A warning or remark."""


def network(config: RunConfig, spec: PictureSpec) -> Classifier:
    """The network for pictures of `spec` that the configuration's method trains, initialised from its seed."""
    kind = lookup(METHODS, config.method, "method").kind(config.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_model(config.model, kind, spec)


def best_network(run: Path, config: RunConfig, splits: Splits) -> tuple[Classifier, int]:
    """The network of a run's best epoch in eval mode, on the data's device, and that epoch."""
    model = network(config, splits.spec)
    best = RunFolder(run).best()
    load_weights(model, best)
    return model.to(splits.test.labels.device).eval(), best.epoch


def train(config: RunConfig, splits: Splits, out: Path, listener: Listener, *, resume: bool = False) -> History:
    """Train the run `config` in the folder `out`, from its last checkpoint if there is one; give its history.

    `splits` lie on the training device. Raises UserError where the folder holds another run, and on a non-finite
    loss, logit or gradient (the last good checkpoint stays).
    """
    model = network(config, splits.spec).to(splits.train.labels.device)
    folder = RunFolder(out)
    _check_sizes(config, splits)
    folder.claim(config, resume or _finished(folder, config))
    folder.clean()
    latest = folder.latest()
    for name in folder.damaged():
        where = f"epoch {latest.epoch} is used" if latest else "training starts anew"
        listener.note(f"checkpoint {name} is cut short or altered; {where}")
    if latest is not None and latest.fingerprint != splits.fingerprint:
        raise UserError(f"{out}: was trained on data with fingerprint {latest.fingerprint}, not {splits.fingerprint}")
    history = list(latest.history) if latest else []
    if history:
        folder.write_metrics(history)
    epochs = config.training.epochs
    for number, phase in enumerate(METHODS[config.method].phases):
        if len(history) < (number + 1) * epochs:
            _run_phase(_state(config, model, phase), phase, number * epochs, splits, folder, history, listener, latest)
        latest = None
    return history


def _finished(folder: RunFolder, config: RunConfig) -> bool:
    latest = folder.latest() if folder.config_path.exists() else None
    return latest is not None and latest.epoch >= len(METHODS[config.method].phases) * config.training.epochs


def _check_sizes(config: RunConfig, splits: Splits) -> None:
    for phase in METHODS[config.method].phases:
        epoch_order(0, 0, len(phase.levels), len(splits.train), config.training.batch_size)


def _state(config: RunConfig, model: Classifier, phase: Phase) -> TrainState:
    device = next(model.parameters()).device
    training = config.training
    optimizers = {
        level: torch.optim.SGD(LEVELS[level](model), training.lr, training.momentum, weight_decay=training.weight_decay)
        for level in phase.levels
    }
    loss = LOSSES[METHODS[config.method].loss or training.loss]
    return TrainState(model, config, loss, optimizers, BatchDraws(torch.Generator(device)), autocast(config, device))


def autocast(config: RunConfig, device: torch.device) -> torch.dtype | None:
    """The lower precision to run convolutions in, if any."""
    wanted = config.runtime.precision
    bf16 = wanted == "bfloat16" or (wanted == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else None


def _run_phase(
    state: TrainState, phase: Phase, before: int, splits: Splits, folder: RunFolder, history: History,
    listener: Listener, latest: Checkpoint | None,
) -> None:  # fmt: skip
    """Epochs `before` + 1 to `before` + training.epochs, those in `history` left out."""
    if latest is not None and latest.epoch > before:
        _restore(state, latest)
    else:
        _calibrate(state, splits.train)
    for epoch in range(len(history), before + state.config.training.epochs):
        try:
            row = _run_epoch(state, phase, epoch, epoch - before, splits.train, listener)
        except NonFinite as error:
            last = f"epoch {len(history)} in {folder.checkpoint_path}" if history else "none yet"
            raise UserError(f"epoch {epoch + 1}: {error}; last good checkpoint: {last}") from None
        row |= _validate(state, splits.val)
        row["score"] = row[METHODS[state.config.method].selects]
        history.append(row)
        optimizers = {level: optimizer.state_dict() for level, optimizer in state.optimizers.items()}
        folder.save(state.model.state_dict(), optimizers, history, splits.fingerprint)
        listener.epoch(row)


def _restore(state: TrainState, checkpoint: Checkpoint) -> None:
    load_weights(state.model, checkpoint)
    for level, content in checkpoint.optimizer_states().items():
        state.optimizers[level].load_state_dict(content)


@torch.no_grad()
def _calibrate(state: TrainState, pictures: Pictures) -> None:
    """Start the routers' and batch norms' running statistics from the first training batches."""
    size = state.config.training.batch_size
    (order,) = epoch_order(state.config.seed, 0, 1, len(pictures), size)
    state.model.train()
    for start in range(0, min(len(order), CALIBRATION_BATCHES * size), size):
        state.model(pictures[_index(order[start : start + size], pictures)].pixels())
    state.model.eval()


def _run_epoch(
    state: TrainState, phase: Phase, epoch: int, progress: int, pictures: Pictures, listener: Listener
) -> dict[str, Any]:
    """One pass over the training set; `epoch` counts from 0 over the run, `progress` within the phase."""
    training, size = state.config.training, state.config.training.batch_size
    orders = epoch_order(state.config.seed, epoch + 1, len(phase.levels), len(pictures), size)
    total, sums, seen, started = math.ceil(len(pictures) / size), Metrics(), 0, time.perf_counter()
    for iteration in range(total):
        state.done = (progress + iteration / total) / training.epochs
        _set_rates(state)
        state.draws.generator.manual_seed(derive_seed(state.config.seed, epoch, iteration))
        rows = [order[iteration * size : (iteration + 1) * size] for order in orders]
        batches = {level: _batch(state, pictures, row) for level, row in zip(phase.levels, rows, strict=True)}
        try:
            metrics = phase.step(state, batches)
        except NonFinite as error:
            raise NonFinite(f"iteration {iteration + 1} of {total}: {error} is not finite") from None
        sums = {name: sums.get(name, 0) + value for name, value in metrics.items()}
        seen += len(rows[0])
        listener.iteration(epoch + 1, iteration + 1, total, sums, seen)
    row = {"epoch": epoch + 1, "lr": state.optimizers[phase.levels[-1]].param_groups[0]["lr"], **_means(sums, seen)}
    for layer, expert, share in collapsed_layers(sums["load"]) if "load" in sums else []:
        listener.note(f"epoch {epoch + 1}: expert {expert} of MoE layer {layer} takes {share:.0%} of the pictures")
    return row | {"train_seconds": time.perf_counter() - started, "iterations": total}


def _set_rates(state: TrainState) -> None:
    """Cosine decay."""
    training = state.config.training
    for level, optimizer in state.optimizers.items():
        base = training.router_lr if level == "routers" else training.lr
        for group in optimizer.param_groups:
            group["lr"] = base * 0.5 * (1 + math.cos(math.pi * state.done))


def _batch(state: TrainState, pictures: Pictures, rows: np.ndarray) -> Batch:
    batch = pictures[_index(rows, pictures)]
    data = state.config.data
    images = augment(batch.images, data.crop_padding, data.flip, state.draws.generator)
    return Pictures(images, batch.labels).pixels(), batch.labels


def _index(rows: np.ndarray, pictures: Pictures) -> torch.Tensor:
    return torch.from_numpy(rows).to(pictures.labels.device)


def _means(sums: Metrics, pictures: int) -> dict[str, Any]:
    """Per-picture means as plain numbers; correct counts in percent, `load` as each expert's share."""
    row: dict[str, Any] = {}
    for name, value in sums.items():
        if name == "router_pictures":
            continue
        if name == "load":
            row["load"] = (value / value.sum(dim=1, keepdim=True)).tolist()
        elif name.endswith("_correct"):
            row[f"train_{name.removesuffix('_correct')}"] = 100 * value.item() / pictures
        else:
            row[name] = (value / sums.get(name.replace("loss", "pictures"), pictures)).item()
    return row


def _validate(state: TrainState, held_out: Pictures) -> dict[str, Any]:
    """SA and RA (PGD-10) on the held-out part: they select the best epoch."""
    started, epsilon = time.perf_counter(), state.config.attack.epsilon
    settings = Pgd(epsilon, evaluation_step(epsilon), VALIDATION_STEPS)
    sa = accuracy(correct_flags(state.model, held_out))
    ra = accuracy(robust_flags(state.model, held_out, settings))
    return {"val_sa": sa, "val_ra": ra, "validate_seconds": time.perf_counter() - started}

"""The only training loop."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.amp import is_autocast_available

from advmoe.attacks import BatchDraws, Pgd, derive_seed
from advmoe.config import RunConfig
from advmoe.data import Pictures, PictureSpec, Source, Splits, cores
from advmoe.errors import UserError, lookup
from advmoe.evaluation.accuracy import accuracy, correct_flags, evaluation_step, robust_flags
from advmoe.models import Classifier, build_model, compact, start_scores
from advmoe.moe import MOMENTUM, ExpertNorm
from advmoe.training.batches import epoch_order
from advmoe.training.checkpoint import Checkpoint, History, RunFolder, load_weights
from advmoe.training.health import NonFinite, collapsed_layers
from advmoe.training.losses import LOSSES
from advmoe.training.methods import LEVELS, METHODS, Phase
from advmoe.training.steps import Metrics, TrainState

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
        model = build_model(config.model, kind, spec)
    model.set_dispatch(config.runtime.dispatch)
    return model


def best_network(run: Path, config: RunConfig, splits: Splits) -> tuple[Classifier, int]:
    """The network of a run's best epoch in eval mode, without what is masked, on the data's device; and that epoch."""
    model = network(config, splits.spec)
    best = RunFolder(run).best()
    load_weights(model, best)
    return compact(model).to(splits.test.labels.device).eval(), best.epoch


def train(config: RunConfig, splits: Splits, out: Path, listener: Listener, *, resume: bool = False) -> History:
    """Train the run `config` in the folder `out`, from its last checkpoint if there is one; give its history.

    `splits` lie on the training device. Raises UserError where the folder holds another run, and on a non-finite
    loss, logit or gradient (the last good checkpoint stays).
    """
    folder = RunFolder(out)
    model = network(config, splits.spec)
    if config.training.init_from is not None and folder.latest() is None:
        _fill(model, config, splits, Path(config.training.init_from))
    model.to(splits.train.labels.device)
    _check_sizes(config, splits)
    autocast(config, splits.train.labels.device)  # refuses what the device lacks before there is a folder
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


def _fill(model: Classifier, config: RunConfig, splits: Splits, source: Path) -> None:
    """Start the masked `model` from a dense run. Raises UserError where `source` is none on the same data."""
    if config.method != "at_sparse":
        raise UserError(f"init_from is for at_sparse, not {config.method}")
    folder = RunFolder(source)
    if folder.config().method != "at_dense":
        raise UserError(f"{source}: init_from needs a run of at_dense, not of {folder.config().method}")
    dense, best = network(replace(config, method="at_dense"), splits.spec), folder.best()
    if best.fingerprint != splits.fingerprint:
        raise UserError(f"{source}: was trained on data with fingerprint {best.fingerprint}, not {splits.fingerprint}")
    load_weights(dense, best)
    model.load_state_dict(dense.state_dict(), strict=False)  # all but the masks
    start_scores(model)


def _finished(folder: RunFolder, config: RunConfig) -> bool:
    latest = folder.latest() if folder.config_path.exists() else None
    return latest is not None and latest.epoch >= len(METHODS[config.method].phases) * config.training.epochs


def _check_sizes(config: RunConfig, splits: Splits) -> None:
    if len(splits.train) % config.training.batch_size == 1:
        raise UserError(
            f"batch_size {config.training.batch_size} leaves one of {len(splits.train)} pictures for the last batch: "
            "too few for batch norm"
        )
    for phase in METHODS[config.method].phases:
        epoch_order(0, 0, len(phase.levels), len(splits.train), config.training.batch_size)


def _state(config: RunConfig, model: Classifier, phase: Phase) -> TrainState:
    device = next(model.parameters()).device
    training = config.training
    # not on the CPU: there it rounds the ends of tensors otherwise than their middles, so that equal experts part
    fused = True if device.type == "cuda" else None
    optimizers = {
        level: torch.optim.SGD(
            _groups(config, model, level), training.lr, training.momentum, weight_decay=training.weight_decay, fused=fused
        )
        for level in phase.levels
    }
    loss = LOSSES[METHODS[config.method].loss or training.loss]
    return TrainState(model, config, loss, optimizers, BatchDraws(torch.Generator(device)), autocast(config, device))


def _groups(config: RunConfig, model: Classifier, level: str) -> list[dict[str, Any]]:
    """The parameters of a level, routers apart: they have a rate of their own, which rises for a share `warmup` of the phase."""
    training, routers = config.training, model.router_parameters()
    own, ids = LEVELS[level](model), {id(parameter) for parameter in routers}
    others = [parameter for parameter in own if id(parameter) not in ids]
    groups = [{"params": others, "initial_lr": training.lr, "warmup": 0.0, "routers": False}]
    if len(others) < len(own):
        groups.append({"params": routers, "initial_lr": training.router_lr, "warmup": training.router_warmup, "routers": True})
    return [group for group in groups if group["params"]]


def autocast(config: RunConfig, device: torch.device) -> torch.dtype | None:
    """The lower precision to run convolutions in, if any. `auto` takes bfloat16 where it is the faster one.

    Raises UserError where `device` has no bfloat16.
    """
    wanted = config.runtime.precision
    if wanted == "bfloat16" and not _has_bfloat16(device):
        raise UserError(f"precision: {device} has float32, not bfloat16")
    faster = wanted == "auto" and _has_bfloat16(device) and _bfloat16_is_fast(device)
    return torch.bfloat16 if wanted == "bfloat16" or faster else None


def _has_bfloat16(device: torch.device) -> bool:
    """Processors without instructions for it still compute it; CUDA devices have it from compute capability 8.0 on."""
    return torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else is_autocast_available(device.type)


def _bfloat16_is_fast(device: torch.device) -> bool:
    """Processors: only with instructions for it. With AVX-512 BF16 an AdvMoE iteration of ResNet-18 took 1 / 1.7 of float32's
    time, one of the demo's narrow network the same (results/precision.json)."""
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())


def _run_phase(
    state: TrainState, phase: Phase, before: int, splits: Splits, folder: RunFolder, history: History,
    listener: Listener, latest: Checkpoint | None,
) -> None:  # fmt: skip
    """Epochs `before` + 1 to `before` + training.epochs, those in `history` left out."""
    if latest is not None:
        _restore(state, latest, within_phase=latest.epoch > before)
    elif before == 0:
        _calibrate(state, splits.train)
    for epoch in range(len(history), before + state.config.training.epochs):
        try:
            row = _run_epoch(state, phase, epoch, epoch - before, splits.train, listener)
        except NonFinite as error:
            last = f"epoch {len(history)} in {folder.checkpoint_path}" if history else "none yet"
            raise UserError(f"epoch {epoch + 1}: {error}; last good checkpoint: {last}") from None
        row |= _validate(state, splits.val) | {"phase": 1 + before // state.config.training.epochs}
        row["score"] = row[METHODS[state.config.method].selects]
        history.append(row)
        optimizers = {level: optimizer.state_dict() for level, optimizer in state.optimizers.items()}
        folder.save(state.model.state_dict(), optimizers, history, splits.fingerprint, splits.spec)
        listener.epoch(row)


def _restore(state: TrainState, checkpoint: Checkpoint, within_phase: bool) -> None:
    """Weights, and the optimizers' states unless the checkpoint ends the phase before."""
    load_weights(state.model, checkpoint)
    for level, content in checkpoint.optimizer_states().items() if within_phase else ():
        optimizer = state.optimizers[level]
        optimizer.load_state_dict(content)
        for group in optimizer.param_groups:
            group["fused"] = optimizer.defaults["fused"]  # whatever the device that wrote the checkpoint


@torch.inference_mode()
def _calibrate(state: TrainState, pictures: Source) -> None:
    """Start the routers' and batch norms' running statistics as means over the first training batches.

    The batch norms' must be as far along as the routers', which standardise what those will give in eval mode: with batch
    norm's own momentum every fresh router would send all pictures to one expert.
    """
    size = state.config.training.batch_size
    (order,) = epoch_order(state.config.seed, 0, 1, len(pictures), size)
    norms = [module for module in state.model.modules() if isinstance(module, nn.BatchNorm2d | ExpertNorm)]
    state.model.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a plain mean
    for start in range(0, min(len(order), CALIBRATION_BATCHES * size), size):
        rows = torch.from_numpy(order[start : start + size]).to(pictures.labels.device)
        state.model(pictures[rows].pixels())
    for norm in norms:
        norm.momentum = MOMENTUM
    state.model.eval()


def _run_epoch(state: TrainState, phase: Phase, epoch: int, progress: int, pictures: Source, listener: Listener) -> dict[str, Any]:
    """One pass over the training set; `epoch` counts from 0 over the run, `progress` within the phase."""
    training, size = state.config.training, state.config.training.batch_size
    loaded = _loaded(state.config, pictures, epoch, len(phase.levels))
    total, sums, seen, started = math.ceil(len(pictures) / size), Metrics(), 0, time.perf_counter()
    for iteration in range(total):
        state.done = (progress + iteration / total) / training.epochs
        _set_rates(state)
        state.draws.generator.manual_seed(derive_seed(state.config.seed, epoch, iteration))
        batches = {level: (batch.pixels(), batch.labels) for level, batch in zip(phase.levels, next(loaded), strict=True)}
        try:
            metrics = phase.step(state, batches)
        except NonFinite as error:
            raise NonFinite(f"iteration {iteration + 1} of {total}: {error} is not finite") from None
        sums = {name: sums.get(name, 0) + value for name, value in metrics.items()}
        seen += len(batches[phase.levels[0]][1])
        listener.iteration(epoch + 1, iteration + 1, total, sums, seen)
    row = {"epoch": epoch + 1, **_rates(state), **_means(sums, seen)}
    for layer, expert, share in collapsed_layers(sums["load"]) if "load" in sums else []:
        listener.note(f"epoch {epoch + 1}: expert {expert} of MoE layer {layer} takes {share:.0%} of the pictures")
    return row | {"train_seconds": time.perf_counter() - started, "iterations": total}


def _set_rates(state: TrainState) -> None:
    """Cosine decay, after a linear rise where the group has one."""
    for optimizer in state.optimizers.values():
        for group in optimizer.param_groups:
            rise = min(1.0, state.done / group["warmup"]) if group["warmup"] else 1.0
            group["lr"] = rise * group["initial_lr"] * 0.5 * (1 + math.cos(math.pi * state.done))


def _rates(state: TrainState) -> dict[str, float]:
    """The last rates: `lr` of what is learned, `router_lr` of the routers beside it."""
    groups = [group for optimizer in state.optimizers.values() for group in optimizer.param_groups]
    return {"router_lr" if group["routers"] else "lr": group["lr"] for group in groups}


def _loaded(config: RunConfig, source: Source, epoch: int, levels: int) -> Iterator[tuple[Pictures, ...]]:
    """The epoch's batches, one for each level, augmented."""
    size = config.training.batch_size
    streams, data = [], config.data
    if levels > 1:
        data = replace(data, workers=max(1, (data.workers or cores()) // levels))
    for level, order in enumerate(epoch_order(config.seed, epoch + 1, levels, len(source), size)):
        rows = [order[start : start + size] for start in range(0, len(order), size)]
        seeds = [derive_seed(config.seed, epoch, iteration, level) for iteration in range(len(rows))]
        streams.append(source.augmented(rows, seeds, data))
    return zip(*streams, strict=True)


def _means(sums: Metrics, pictures: int) -> dict[str, Any]:
    """Per-picture means as plain numbers; correct counts in percent, `load` as each expert's share, `dead` experts by layer."""
    row: dict[str, Any] = {}
    for name, value in sums.items():
        if name == "router_pictures":
            continue
        if name == "load":
            row["load"] = (value / value.sum(dim=1, keepdim=True)).tolist()
            row["dead"] = [(counts == 0).nonzero()[:, 0].tolist() for counts in value]
        elif name == "router_entropy":
            row[name] = (value / pictures).tolist()
        elif name.endswith("_correct"):
            row[f"train_{name.removesuffix('_correct')}"] = 100 * value.item() / pictures
        else:
            row[name] = (value / sums.get(name.replace("loss", "pictures"), pictures)).item()
    return row


def _validate(state: TrainState, held_out: Source) -> dict[str, Any]:
    """SA and RA (PGD-10) on the held-out part: they select the best epoch."""
    started, epsilon = time.perf_counter(), state.config.attack.epsilon
    settings = Pgd(epsilon, evaluation_step(epsilon), VALIDATION_STEPS)
    model = state.twin()
    with torch.inference_mode():
        correct = correct_flags(model, held_out)
    sa, ra = accuracy(correct), accuracy(robust_flags(model, held_out, settings, correct=correct))
    return {"val_sa": sa, "val_ra": ra, "validate_seconds": time.perf_counter() - started}

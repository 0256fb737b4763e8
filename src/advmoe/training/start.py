"""The start of a run: checks, the network, the state of a phase, the first running statistics, and the batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.amp import is_autocast_available

from advmoe import distributed
from advmoe.attacks import BatchDraws, derive_seed
from advmoe.config import DataConfig, Precision, RunConfig, TrainingConfig
from advmoe.config.choices import BACKBONES
from advmoe.config.schema import OF_LEVELS
from advmoe.data import Images, ImageSpec, Source, Splits, cores
from advmoe.data.images import check_splits
from advmoe.errors import UserError, lookup
from advmoe.models import Classifier, build_model, compact, start_scores
from advmoe.moe import GATES, MoEKind, check_gate, check_routings
from advmoe.training.batches import epoch_order
from advmoe.training.checkpoint import RunFolder, load_weights
from advmoe.training.compiled import check_compile
from advmoe.training.groups import MAX_CLASSES, resting_share
from advmoe.training.losses import LOSSES, RSLAD, lookup_loss
from advmoe.training.methods import LEVELS, METHODS, Phase, lookup_method
from advmoe.training.steps import TrainState
from advmoe.training.terms import TERMS

NEEDED = {  # option -> the option without which it would do nothing
    "awp_routers": "awp", "awp_from": "awp", "augment_from": "augment", "generated_share": "generated",
}  # fmt: skip


def check(config: RunConfig, splits: Splits) -> None:
    """Raises UserError if the configuration cannot be trained on these data. Nothing has been written at this point."""
    lookup_method(config.method)
    lookup_loss(config.training.loss)
    for name in ("router_gate", "router_attack_gate"):
        lookup(GATES, getattr(config.training, name), name)
        check_gate(getattr(config.training, name), config.model.num_experts)
    check_splits(splits, config.data.dataset)
    _check_ingredients(config, splits)
    _check_router_options(config, splits)
    _check_sizes(config, splits)
    autocast(config.runtime.precision, splits.train.labels.device)
    check_compile(config.runtime, splits.train.labels.device)


def _check_ingredients(config: RunConfig, splits: Splits) -> None:
    """Raises UserError if an option is set that does not work with the method, its loss or the other options."""
    training, method = config.training, METHODS[config.method]
    loss_name, level_options = method.loss or training.loss, _changed(training, *OF_LEVELS)
    if level_options and not method.two_levels:
        raise UserError(f"{level_options[0]} is for advmoe, not {config.method}")
    if config.data.augment != "crop_flip" and not isinstance(splits.train, Images):
        raise UserError(f"augment {config.data.augment} is for images in memory, not for {config.data.dataset}")
    for option, needed in NEEDED.items():
        section = config.data if option in DataConfig.model_fields else training
        if _changed(section, option) and not _changed(section, needed):
            raise UserError(f"{option} needs {needed}")
    padding, side = config.data.crop_padding, min(splits.spec.shape[1:])
    if padding >= side and (config.data.augment == "crop_flip" or config.data.augment_from):
        raise UserError(f"crop_padding must be less than {side}, the side of the images, not {padding}")
    if training.teacher is not None and loss_name != "trades":
        raise UserError(f"teacher needs the loss trades, not {loss_name}")
    if training.soft_labels == "adr" and not training.ema:
        raise UserError("soft_labels adr needs ema")


def _check_router_options(config: RunConfig, splits: Splits) -> None:
    """Raises UserError if an option of the routers is set that does not work with the method, its loss or the other options."""
    training, method = config.training, METHODS[config.method]
    routed = isinstance(method.kind(config.model), MoEKind)
    loss_name, classes, experts = method.loss or training.loss, len(splits.spec.classes), config.model.num_experts
    attacked = _changed(training, "router_consistency", "router_margin", "runner_up_consistency", "awp_routers", "router_target")
    options = [*attacked, *_changed(training, "router_schedule", "router_statistics", "balance")]
    if options and not routed:
        raise UserError(f"{options[0]} is for methods with routers, not {config.method}")
    if training.router_consistency and not LOSSES[loss_name].has_clean:
        raise UserError(f"router_consistency needs a loss with clean images, not {loss_name}")
    if attacked and LOSSES[loss_name].attack is None:
        raise UserError(f"{attacked[0]} needs a loss with an attack")
    if training.router_target == "confusion" and classes > MAX_CLASSES:
        raise UserError(f"router_target confusion takes at most {MAX_CLASSES} classes, not {classes}")
    if training.router_target == "confusion" and training.epochs < 2:
        raise UserError("router_target confusion needs at least 2 epochs: in the first, it is counted which classes are confused")
    if training.router_target != "none" and experts > classes:
        raise UserError(f"router_target needs a class for each expert: there are {experts} experts and {classes} classes")
    for option in _changed(training, "runner_up_consistency", "router_margin") if experts < 2 else []:
        raise UserError(f"{option} needs at least 2 experts")
    if training.router_loss == "target" and training.router_target == "none":
        raise UserError("router_loss target needs a router_target")
    if routed and method.two_levels and not any(weight(training) for weight, _ in TERMS):
        if training.router_loss == "target":
            raise UserError("router_loss target leaves the routers no loss: all router terms have the weight 0")
        if training.router_gate == "hard":
            raise UserError("router_gate hard passes the routers no gradient, and there is no router term that they learn from")
    if routed and 0 < training.router_warmup <= resting_share(config) and training.router_schedule == "phase":
        raise UserError(
            f"router_warmup {training.router_warmup:g} ends before the routers learn, after {resting_share(config):g} of the "
            "epochs: with router_schedule untied it begins then"
        )


def _changed(section: TrainingConfig | DataConfig, *names: str) -> list[str]:
    """Those of the settings `names` that differ from their defaults."""
    default = type(section)()
    return [name for name in names if getattr(section, name) != getattr(default, name)]


def _check_sizes(config: RunConfig, splits: Splits) -> None:
    size, images, processes = config.training.batch_size, len(splits.train), distributed.world_size()
    last = images % size or size
    least = 2 if processes == 1 else processes if config.training.sync_norm else 2 * processes
    if last < least:
        count = "one" if last == 1 else str(last)
        of = "" if processes == 1 else f" of {processes} processes"
        raise UserError(f"batch_size {size} leaves {count} of {images} images for the last batch: too few for batch norm{of}")
    if len(splits.val) < processes:
        raise UserError(f"{len(splits.val)} held-out images are too few for {processes} processes")
    for phase in METHODS[config.method].phases:
        epoch_order(0, 0, 1 if config.training.level_batches == "same" else len(phase.levels), images, size)


def network(config: RunConfig, spec: ImageSpec) -> Classifier:
    """The network for images of `spec` that the configuration's method trains, initialised from its seed."""
    kind = lookup_method(config.method).kind(config.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(config.model, kind, spec)
    model.set_dispatch(config.runtime.dispatch)
    return model


def best_network(run: Path, config: RunConfig, splits: Splits) -> Classifier:
    """The network of a run's best epoch. Raises UserError if there is no such checkpoint.

    The network is in eval mode, without masked channels, on the device of the data.
    """
    model = network(config, splits.spec)
    load_weights(model, RunFolder(run).best())
    return compact(model).to(splits.test.labels.device).eval()


def initial_network(config: RunConfig, splits: Splits) -> Classifier:
    """The network that a run starts with, on the data's device. Raises UserError if `init_from` is not a run that fits."""
    model = network(config, splits.spec)
    if config.training.init_from is not None:
        _load_dense(model, config, splits, Path(config.training.init_from))
    model = model.to(splits.train.labels.device)
    if config.model.backbone not in BACKBONES:
        check_routings(model.eval(), splits.train[torch.zeros(1, dtype=torch.int64, device=splits.train.labels.device)].pixels())
        model.train()
    return model


def _load_dense(model: Classifier, config: RunConfig, splits: Splits, source: Path) -> None:
    """Copy the weights of the dense run `source` into the masked `model`. Raises UserError if the run does not fit."""
    if config.method != "at_sparse":
        raise UserError(f"init_from is for at_sparse, not {config.method}")
    folder = RunFolder(source)
    if folder.config().method != "at_dense":
        raise UserError(f"{source}: init_from needs a run of at_dense, not of {folder.config().method}")
    if (activation := folder.config().model.activation) != config.model.activation:  # other differences change the weights' names
        raise UserError(f"{source}: init_from needs a run with activation {config.model.activation}, not {activation}")
    dense, best = network(config.replace(method="at_dense"), splits.spec), folder.best()
    if best.fingerprint != splits.fingerprint:
        raise UserError(f"{source}: was trained on data with fingerprint {best.fingerprint}, not {splits.fingerprint}")
    load_weights(dense, best)
    model.load_state_dict(dense.state_dict(), strict=False)  # all but the masks
    start_scores(model)


def train_state(config: RunConfig, model: Classifier, phase: Phase) -> TrainState:
    """The state that a phase starts with: the levels' optimizers at their initial rates."""
    device = next(model.parameters()).device
    training = config.training
    # not on the CPU: there it rounds the ends of a tensor differently from its middle, so equal experts would become different
    fused = True if device.type == "cuda" else None
    optimizers = {
        level: torch.optim.SGD(
            _groups(config, model, level), training.lr, training.momentum, weight_decay=training.weight_decay, fused=fused
        )
        for level in phase.levels
    }
    loss = LOSSES[METHODS[config.method].loss or training.loss] if training.teacher is None else RSLAD
    return TrainState(
        model, config, loss, optimizers, BatchDraws(torch.Generator(device)), autocast(config.runtime.precision, device)
    )


def _groups(config: RunConfig, model: Classifier, level: str) -> list[dict[str, Any]]:
    """The parameter groups of a level. Routers are a separate group: their learning rate differs, and rises during `warmup`.

    `start` is the fraction of the phase at which the group's schedule starts, `warmup` a fraction of the schedule.
    """
    training, routers = config.training, model.router_parameters()
    parameters, ids = LEVELS[level](model), {id(parameter) for parameter in routers}
    others = [parameter for parameter in parameters if id(parameter) not in ids]
    groups = [{"params": others, "initial_lr": training.lr, "start": 0.0, "warmup": 0.0, "routers": False}]
    if len(others) < len(parameters):
        start = resting_share(config) if training.router_schedule == "untied" else 0.0
        rate, warmup = training.router_lr, training.router_warmup
        groups.append({"params": routers, "initial_lr": rate, "start": start, "warmup": warmup, "routers": True})
    return [group for group in groups if group["params"]]


def autocast(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast: bfloat16, or None for float32. `auto` means bfloat16 if it is faster on `device`.

    Raises UserError if bfloat16 is requested and `device` does not support it.
    """
    if precision == "bfloat16" and not _has_bfloat16(device):
        raise UserError(f"precision: {device} has float32, not bfloat16")
    faster = precision == "auto" and _has_bfloat16(device) and _bfloat16_is_fast(device)
    return torch.bfloat16 if precision == "bfloat16" or faster else None


def _has_bfloat16(device: torch.device) -> bool:
    """Whether `device` can compute in bfloat16. CPUs can even without instructions for it; CUDA needs compute capability 8.0."""
    return torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else is_autocast_available(device.type)


def _bfloat16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32. CPUs need AVX-512 BF16.

    There an AdvMoE iteration of ResNet-18 was 1.7 times as fast as in float32. The narrow network of the demo was equally fast in
    both (results/benchmarks/precision.json).
    """
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())


def batches(config: RunConfig, source: Source, epoch: int, levels: int, first: int = 0) -> Iterator[tuple[Images, ...]]:
    """The batches of an epoch, from iteration `first` (from 0): for each iteration one augmented batch per level.

    Each batch contains only the images of this rank.
    """
    if config.training.level_batches == "same" and levels > 1:
        return ((images,) * levels for (images,) in _streams(config, source, epoch, 1, first))
    return _streams(config, source, epoch, levels, first)


def _augmentation(config: RunConfig, epoch: int) -> DataConfig:
    """The data settings of an epoch (from 0): `crop_flip` before the share `augment_from` of its phase."""
    epochs = config.training.epochs
    # not augment_from * epochs, which is rounded: 0.55 * 100 is more than 55
    return config.data if (epoch % epochs) / epochs >= config.data.augment_from else config.data.replace(augment="crop_flip")


def _streams(config: RunConfig, source: Source, epoch: int, levels: int, first: int) -> Iterator[tuple[Images, ...]]:
    size = config.training.batch_size
    streams, data = [], _augmentation(config, epoch)
    if levels > 1:
        data = data.replace(workers=max(1, (data.workers or cores()) // levels))
    for level, order in enumerate(epoch_order(config.seed, epoch + 1, levels, len(source), size)):
        rows = [order[start : start + size] for start in range(0, len(order), size)]
        seeds = [derive_seed(config.seed, epoch, iteration, level) for iteration in range(len(rows))]
        streams.append(source.augmented(rows[first:], seeds[first:], data))
    return zip(*streams, strict=True)

"""The start of a run: its network, and the state of a phase."""

from pathlib import Path
from typing import Any

import torch

from advmoe.attacks import BatchDraws
from advmoe.config import RunConfig, TrainingConfig
from advmoe.config.choices import BACKBONES
from advmoe.data import ImageSpec, Splits
from advmoe.errors import UserError
from advmoe.models import Classifier, build_model, compact, start_scores
from advmoe.moe import check_routings
from advmoe.training.checkpoint import Checkpoint, RunFolder, load_weights
from advmoe.training.groups import resting_share
from advmoe.training.losses import LOSSES, RSLAD
from advmoe.training.methods import LEVELS, METHODS, Phase, lookup_method
from advmoe.training.precision import autocast_dtype
from advmoe.training.steps import TrainState


def network(config: RunConfig, spec: ImageSpec) -> Classifier:
    """The network for images of `spec` that the configuration's method trains, initialised from its seed. Raises UserError if it
    cannot be built (`build_model`)."""
    kind = lookup_method(config.method).kind(config.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(config.model, kind, spec)
    model.set_dispatch(config.runtime.dispatch)
    return model


def best_network(best: Checkpoint, config: RunConfig, splits: Splits) -> Classifier:
    """The network of the checkpoint `best`. Raises UserError if its weights cannot be read or are those of another network.

    The network is in eval mode, without masked channels, on the device of the data.
    """
    model = network(config, splits.spec)
    load_weights(model, best)
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
    optimizers = {level: _optimizer(_groups(config, model, level), training, fused) for level in phase.levels}
    loss = LOSSES[METHODS[config.method].loss or training.loss] if training.teacher is None else RSLAD
    return TrainState(
        model, config, loss, optimizers, BatchDraws(torch.Generator(device)), autocast_dtype(config.runtime.precision, device)
    )


def _optimizer(groups: list[dict[str, Any]], training: TrainingConfig, fused: bool | None) -> torch.optim.SGD:
    """SGD for the parameter groups. If it is fused, every momentum starts at 0, which changes no step: otherwise PyTorch fails if
    the first gradient of a parameter comes later than those of its group."""
    optimizer = torch.optim.SGD(groups, training.lr, training.momentum, weight_decay=training.weight_decay, fused=fused)
    if fused and training.momentum:
        for parameter in (parameter for group in groups for parameter in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


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

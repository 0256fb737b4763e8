"""The start of a run in its folder, and the state in a checkpoint."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch.optim.optimizer import StateDict

from advmoe import distributed
from advmoe.config import RunConfig
from advmoe.data import Splits
from advmoe.errors import UserError
from advmoe.training.checkpoint import Checkpoint, RunFolder, load_weights
from advmoe.training.ema import Ema
from advmoe.training.steps import TrainState

log = logging.getLogger("advmoe")
TRAINED = "trained"  # key, beside the optimizers' states, of the weights in training if the weights' file holds their average
# what an optimizer's groups keep from the configuration and device, whatever the checkpoint says
CONFIGURED = ("fused", "initial_lr", "start", "warmup", "routers")


@contextmanager
def claimed(folder: RunFolder, config: RunConfig, splits: Splits, resume: bool) -> Iterator[Checkpoint | None]:
    """Lock the folder for this run, and yield the checkpoint to continue from. Only rank 0 locks and reads the folder.

    Raises UserError if another process trains there, or if the folder holds another run or this one without `resume`.
    """
    with ExitStack() as stack:

        def claim() -> Checkpoint | None:
            restarted = distributed.restart_count() > 0 and folder.was_claimed_by(distributed.launch_id())
            if resume and not folder.config_path.exists():
                log.warning("%s holds no run yet: training starts anew", folder.path)
            stack.enter_context(folder.locked())
            folder.claim(config, resume or restarted)
            folder.sign(distributed.launch_id())
            return _cleaned(folder, splits)

        yield distributed.on_rank_zero(claim)


def _cleaned(folder: RunFolder, splits: Splits) -> Checkpoint | None:
    """Remove the temporary files of a killed process, and return the latest checkpoint."""
    folder.clean()
    latest = folder.latest()
    for name in folder.damaged():
        instead = f"{latest.folder.name} is used" if latest else "training starts anew"
        log.warning("checkpoint %s is cut short or altered; %s", name, instead)
    if latest is None:
        return None
    if latest.fingerprint != splits.fingerprint:
        raise UserError(f"{folder.path}: was trained on data with fingerprint {latest.fingerprint}, not {splits.fingerprint}")
    folder.prune(latest.history, latest.folder)
    if latest.history:
        folder.write_metrics(latest.history)
    return latest


def check_unchanged(config: RunConfig, digests: Mapping[str, str], last_row: Mapping[str, object]) -> None:
    """Raises UserError if the run began with another teacher or other generated images than those of `digests`.

    `last_row` is that of the run's last epoch, or empty. Rows of older versions have no digest of generated images; every row with
    a teacher has its digest.
    """
    named = {"teacher": (config.training.teacher, "weights"), "generated": (config.data.generated, "images")}
    for name, digest in digests.items():
        if last_row.get(name) not in (None, digest):
            path, content = named[name]
            raise UserError(f"{name} {path}: its {content} have changed since the run began")


def restore(state: TrainState, checkpoint: Checkpoint, within_phase: bool) -> StateDict:
    """Load the weights in training, and `within_phase` the optimizers' states. Raises UserError if they belong to another run.

    Returns what is stored beside a moving average of the weights; empty without one.
    """
    averaged = state.config.training.ema > 0
    states = distributed.on_rank_zero(checkpoint.optimizer_states) if within_phase or averaged else {}
    trained = states.pop(TRAINED, {})
    weights = trained.get("weights", {}) if averaged else None
    distributed.on_rank_zero(partial(load_weights, state.model, checkpoint, weights))
    distributed.broadcast_state(state.model)
    states = states if within_phase else {}
    if within_phase and states.keys() != state.optimizers.keys():
        raise UserError(f"{checkpoint.folder}: holds the states of {', '.join(states)}, not of {', '.join(state.optimizers)}")
    for level, content in states.items():
        optimizer = state.optimizers[level]
        configured = [{name: group[name] for name in CONFIGURED} for group in optimizer.param_groups]
        _load(optimizer, content, f"{checkpoint.folder}: holds another run's states of level {level}")
        for group, ours in zip(optimizer.param_groups, configured, strict=True):
            group.update(ours)
    return trained


def restore_average(ema: Ema, checkpoint: Checkpoint, trained: StateDict) -> None:
    """Load the moving average of the weights; `trained` is what `restore` returned. Raises UserError if there is none."""
    distributed.on_rank_zero(partial(load_weights, ema.model, checkpoint))
    distributed.broadcast_state(ema.model)
    if type(trained.get("updates")) is not int:
        raise UserError(f"{checkpoint.folder}: holds no moving average")
    ema.updates = trained["updates"]


def _load(optimizer: torch.optim.Optimizer, content: StateDict, complaint: str) -> None:
    """Raises UserError, with `complaint`, if `content` is not a state of this optimizer."""
    try:
        optimizer.load_state_dict(content)
        fits = all(value.shape == parameter.shape for parameter, state in optimizer.state.items() for value in state.values())
    except Exception as error:  # any exception can come out of a state of another kind
        raise UserError(f"{complaint} ({type(error).__name__})") from None
    if not fits:
        raise UserError(f"{complaint} (of other shapes)")

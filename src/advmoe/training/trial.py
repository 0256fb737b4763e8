"""Iterations on random images and a copy of the network, before a run starts: to time them, or to see whether they run."""

import logging
from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from advmoe import distributed
from advmoe.config import RunConfig
from advmoe.data import ImageSpec
from advmoe.errors import reason_of
from advmoe.models import Classifier
from advmoe.moe import synchronise
from advmoe.moe.copies import copied
from advmoe.training.methods import METHODS, Phase
from advmoe.training.start import train_state

log = logging.getLogger("advmoe")


def trial(
    config: RunConfig, model: Classifier, spec: ImageSpec, phase: Phase, done: float = 1.0, iteration: int = 0
) -> Callable[[], object]:
    """Iteration number `iteration` of `phase`, after its fraction `done`, with a learning rate of 0.

    By default it is at the end of a run, when experts are not tied.

    `model` and torch's random numbers stay as they are. Labels are hard, because soft labels cost the same in every variant.
    """
    device = next(model.parameters()).device
    config = config.replace(training=config.training.replace(soft_labels="none", teacher=None))
    network = copied(model).eval()
    synchronise(network, distributed.world_size() > 1 and config.training.sync_norm)  # as in the run
    state = train_state(config, network, phase)
    state.done, state.iteration = done, iteration
    state.groups = torch.zeros(len(spec.classes), dtype=torch.int64, device=device)  # no router waits for its target
    state.draws.batch = config.training.batch_size if distributed.world_size() > 1 else None
    for group in (group for optimizer in state.optimizers.values() for group in optimizer.param_groups):
        group["lr"] = 0.0
    size = distributed.local_size(config.training.batch_size)
    random = torch.Generator(device).manual_seed(0)
    x = torch.rand(size, *spec.shape, device=device, generator=random)
    y = torch.randint(len(spec.classes), (size,), device=device, generator=random)
    return partial(phase.step, state, dict.fromkeys(phase.levels, (x, y)))


def compilable(config: RunConfig, model: Classifier, spec: ImageSpec) -> RunConfig:
    """The configuration, with `compile` none if an iteration cannot be compiled; the log gets one line with the reason.

    What is compiled here is what the run uses later, except the averaged network's pass for ADR.
    """
    if config.runtime.compile == "none":
        return config
    training = config.training
    times = (1.0, 0.0) if training.tied_share and training.tied_statistics == "shared" else (1.0,)
    numbers = (0, 1) if training.weight_attack_gate == "alternate" else (0,)
    try:
        for phase, done, iteration in product(METHODS[config.method].phases, times, numbers):
            trial(config, model, spec, phase, done, iteration)()
    except Exception as error:  # a compiler can raise any exception
        reason = reason_of(getattr(error, "inner_exception", error), named=True)  # of the error that a compiler's error wraps
        log.warning("compile %s failed; the run continues without it: %s", config.runtime.compile, reason)
        return config.replace(runtime=config.runtime.replace(compile="none"))
    return config

"""Accuracy on the held-out part, which selects the best epoch."""

import time

import torch

from advmoe import distributed
from advmoe.attacks import evaluation_pgd
from advmoe.data import Source
from advmoe.models import fused
from advmoe.training.accuracy import correct_flags, robust_flags
from advmoe.training.steps import TrainState

VALIDATION_STEPS = 10


def validate(state: TrainState, held_out: Source) -> dict[str, float]:
    """SA and RA (PGD-10) in percent on the held-out part. Each rank attacks its share."""
    started, epsilon = time.perf_counter(), state.config.attack.epsilon
    settings = evaluation_pgd(epsilon, VALIDATION_STEPS)
    rows = torch.arange(distributed.rank(), len(held_out), distributed.world_size())
    model = state.fused_model() if state.ema is None else fused(state.ema.model)
    share = held_out.subset(rows.to(held_out.labels.device))
    correct = correct_flags(model, share)
    robust = robust_flags(model, share, settings, correct=correct, numbers=rows.tolist())
    sa, ra = (100 * distributed.sum_over_ranks(flags.sum()).item() / len(held_out) for flags in (correct, robust))
    return {"val_sa": sa, "val_ra": ra, "validate_seconds": time.perf_counter() - started}

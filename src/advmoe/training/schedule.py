"""Learning rates."""

import math
from typing import Any

from advmoe.training.steps import TrainState


def set_rates(state: TrainState, lowered: float) -> None:
    """Set the learning rates: cosine decay from the group's start, times a factor that rises linearly
    from 0 to 1 in the group's warm-up.

    `lowered` multiplies the routers' rate, or all rates if no router learns: it is below 1 after a non-finite value.
    """
    routed = routers_learn(state)
    for group in _groups(state):
        start = group["start"]
        done = max(0.0, state.done - start) / (1 - start) if start < 1 else 0.0
        rise = min(1.0, done / group["warmup"]) if group["warmup"] else 1.0
        rise *= lowered if group["routers"] or not routed else 1.0
        group["lr"] = rise * group["initial_lr"] * 0.5 * (1 + math.cos(math.pi * done))


def routers_learn(state: TrainState) -> bool:
    """Whether routers learn at this point of the phase."""
    return not state.routers_rest and any(group["routers"] for group in _groups(state))


def rates(state: TrainState) -> dict[str, float]:
    """The current rates by their name in metrics.jsonl: `router_lr` of routers, `lr` of everything else."""
    return {"router_lr" if group["routers"] else "lr": group["lr"] for group in _groups(state)}


def _groups(state: TrainState) -> list[dict[str, Any]]:
    return [group for optimizer in state.optimizers.values() for group in optimizer.param_groups]

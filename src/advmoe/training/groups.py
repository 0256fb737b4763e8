"""Groups of classes that are often confused under attack: the router target `confusion`.

In the first epochs, the predicted classes of attacked training images are counted for each class. At the end of these epochs the
classes are divided into groups, one for each expert. The counts and the groups are part of the history, so every checkpoint has
them.

Shapes: B images, C classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advmoe.config import RunConfig, TrainingConfig

COUNTED_PART = 10  # confusions are counted in the first 1/10 of the epochs
MAX_CLASSES = 256  # every checkpoint holds C x C counts for each counted epoch
STARTS = 16
MATRIX, GROUPS = "confusion", "router_groups"  # in a row of the history


def confusion(logits: Tensor, y: Tensor) -> Tensor:
    """[C, C] int64: how often each class (row) was predicted as each class (column)."""
    classes = logits.shape[1]
    pairs = y * classes + logits.argmax(dim=1)
    return pairs.new_zeros(classes**2).scatter_add_(0, pairs, torch.ones_like(pairs)).view(classes, classes)


def counted_epochs(config: RunConfig) -> int:
    """The number of epochs, at the start, in which confusions are counted."""
    return math.ceil(config.training.epochs / COUNTED_PART)


def learn_from_terms_alone(training: TrainingConfig) -> bool:
    """Whether routers get no gradient from the network's loss, only from the router terms."""
    return training.router_loss == "target" or training.router_gate == "hard"


def resting_share(config: RunConfig) -> float:
    """The share of a phase, at its start, in which no router learns: experts are tied, or the groups of the only target are not
    known yet."""
    training = config.training
    waits = training.router_target == "confusion" and learn_from_terms_alone(training)
    return max(training.tied_share, counted_epochs(config) / training.epochs if waits else 0.0)


def groups_of(history: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor | None:
    """[C] int64, the group of each class, once the history has it."""
    groups = next((row[GROUPS] for row in reversed(history) if GROUPS in row), None)
    return None if groups is None else torch.tensor(groups, device=device)


def new_groups(config: RunConfig, history: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """The new fields of the last row of the history: the groups after the last counted epoch, else none."""
    if len(history) != counted_epochs(config) or MATRIX not in history[-1]:
        return {}
    counts = np.sum([row[MATRIX] for row in history], axis=0)
    return {GROUPS: balanced_groups(counts, config.model.num_experts)}


def balanced_groups(counts: np.ndarray, groups: int) -> list[int]:
    """The group of each class, from 0. The sizes of groups differ by at most one class; groups are ordered by their first class.

    `counts` is [C, C]. The search maximises the sum, over all pairs of classes in the same group, of the rates at which they are
    confused. It starts from several random divisions (always the same ones). In each step it exchanges the two classes of different
    groups that improve the sum most, until no exchange improves it (after Kernighan and Lin 1970). Equal sizes keep the loads of
    the experts even.
    """
    rates = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    affinity = rates + rates.T
    np.fill_diagonal(affinity, 0)
    sizes = [len(part) for part in np.array_split(np.arange(len(counts)), groups)]
    even, random = np.repeat(np.arange(groups), sizes), np.random.default_rng(0)
    divisions = [_best_exchanges(affinity, random.permutation(even), groups) for _ in range(STARTS)]
    best = max(divisions, key=lambda division: affinity[division[:, None] == division].sum())
    first = list(dict.fromkeys(best.tolist()))
    return [first.index(group) for group in best.tolist()]


def _best_exchanges(affinity: np.ndarray, division: np.ndarray, groups: int) -> np.ndarray:
    """The division [C] after the best exchange of two classes, again and again, until none helps."""
    while True:
        members = np.eye(groups)[division]
        pull = affinity @ members  # [C, groups]: the sum of a class's rates with the members of each group
        to_other = pull[:, division] - pull[np.arange(len(division)), division][:, None]  # of a class to another class's group
        gain = to_other + to_other.T - 2 * affinity
        gain[division[:, None] == division] = 0
        first, second = np.unravel_index(gain.argmax(), gain.shape)
        if gain[first, second] < 1e-9:
            return division
        division[[first, second]] = division[[second, first]]

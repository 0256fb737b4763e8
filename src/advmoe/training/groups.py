"""Groups of classes that are confused with one another under attack: the router target `confusion`.

During the first epochs the classes that attacked training images are taken for are counted. At the end of these epochs the classes
are divided into as many groups as there are experts. The counts and the groups are part of the history, so every checkpoint
has them. Shapes: B images, C classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advmoe.config import RunConfig

COUNTED_PART = 10  # one in so many epochs, at the start
MAX_CLASSES = 256  # every checkpoint holds C x C counts for each counted epoch
STARTS = 16
MATRIX, GROUPS = "confusion", "router_groups"  # in a row of the history


def confusion(logits: Tensor, y: Tensor) -> Tensor:
    """[C, C] int64: how often each class (row) was taken for each class (column)."""
    classes = logits.shape[1]
    pairs = y * classes + logits.argmax(dim=1)
    return pairs.new_zeros(classes**2).scatter_add_(0, pairs, torch.ones_like(pairs)).view(classes, classes)


def counted_epochs(config: RunConfig) -> int:
    """The number of epochs, at the start, in which confusions are counted."""
    return math.ceil(config.training.epochs / COUNTED_PART)


def groups_of(history: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor | None:
    """[C] int64, the group of each class, once the history has it."""
    groups = next((row[GROUPS] for row in reversed(history) if GROUPS in row), None)
    return None if groups is None else torch.tensor(groups, device=device)


def new_groups(config: RunConfig, history: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """What the last row of the history gets: the groups if it is the last counted epoch, else nothing."""
    if len(history) != counted_epochs(config) or MATRIX not in history[-1]:
        return {}
    counts = np.sum([row[MATRIX] for row in history], axis=0)
    return {GROUPS: balanced_groups(counts, config.model.num_experts)}


def balanced_groups(counts: np.ndarray, groups: int) -> list[int]:
    """The group of each class, from 0; groups differ by at most one class in size, and are numbered by their first class.

    `counts` is [C, C]. The sum, over the pairs of classes in one group, of the rates at which one is taken for the other is
    maximised: from several random divisions (always the same ones), the two classes whose exchange helps most are exchanged until
    no exchange helps (after Kernighan and Lin 1970). Equal sizes keep the experts' loads even.
    """
    rates = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    affinity = rates + rates.T
    np.fill_diagonal(affinity, 0)
    sizes = [len(part) for part in np.array_split(np.arange(len(counts)), groups)]
    even, random = np.repeat(np.arange(groups), sizes), np.random.default_rng(0)
    divisions = [_improved(affinity, random.permutation(even), groups) for _ in range(STARTS)]
    best = max(divisions, key=lambda division: affinity[division[:, None] == division].sum())
    first = list(dict.fromkeys(best.tolist()))
    return [first.index(group) for group in best.tolist()]


def _improved(affinity: np.ndarray, division: np.ndarray, groups: int) -> np.ndarray:
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

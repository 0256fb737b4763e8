"""Groups of classes that the network confuses."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from recorder import Recorder

from advmoe.errors import UserError
from advmoe.training.checkpoint import RunFolder
from advmoe.training.groups import balanced_groups, confusion, counted_epochs, groups_of
from advmoe.training.loop import train


def test_confusion_by_hand():
    logits = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]])
    assert confusion(logits, torch.tensor([0, 0, 0, 2])).tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 1]]


def test_groups_by_hand():
    counts = np.array([[90, 1, 9, 0], [2, 80, 0, 18], [20, 0, 80, 0], [0, 5, 1, 94]])  # 0 and 2 are confused, 1 and 3
    assert balanced_groups(counts, 2) == [0, 1, 0, 1]
    assert balanced_groups(counts, 1) == [0, 0, 0, 0]
    assert sorted(balanced_groups(counts, 3)) == [0, 0, 1, 2]
    assert balanced_groups(counts, 3)[0] == balanced_groups(counts, 3)[2]
    assert balanced_groups(counts, 6) == [0, 1, 2, 3]
    assert balanced_groups(np.zeros((5, 5), int), 2).count(0) in (2, 3)  # no counts


def test_groups_are_the_best_of_all_divisions():
    random = np.random.default_rng(1)
    for groups in (2, 4):
        counts = random.integers(0, 50, (8, 8)) + 100 * np.eye(8, dtype=int)
        rates = counts / counts.sum(axis=1, keepdims=True)

        def value(division, rates=rates):
            same = np.equal.outer(division, division) & ~np.eye(8, dtype=bool)
            return rates[same].sum()

        even = np.repeat(np.arange(groups), 8 // groups)
        best = max(value(np.array(division)) for division in set(permutations(even.tolist())))
        assert value(np.array(balanced_groups(counts, groups))) == pytest.approx(best)


@pytest.mark.parametrize("only_terms", [{"router_loss": "target"}, {"router_gate": "hard"}])
def test_routers_learn_their_groups_after_the_counted_epochs(only_terms, tiny, splits, tmp_path):
    config = tiny(router_target="confusion", tied_share=0.0, num_experts=3, **only_terms)
    assert [counted_epochs(tiny(epochs=epochs)) for epochs in (1, 10, 11, 30)] == [1, 1, 2, 3]
    first, second, _ = train(config, splits, tmp_path / "run", Recorder())
    assert np.sum(first["confusion"]) == len(splits.train)
    assert "router_loss" not in first  # routers have no target yet
    assert first["router_groups"] == balanced_groups(np.array(first["confusion"]), 3)
    assert "confusion" not in second
    assert second["router_loss"] > 0
    latest = RunFolder(tmp_path / "run").latest()
    assert groups_of(latest.history, torch.device("cpu")).tolist() == first["router_groups"]


@pytest.mark.parametrize("target", ["label_mod_n", "confusion"])
def test_more_experts_than_classes_are_refused(target, tiny, splits, tmp_path):
    with pytest.raises(UserError, match=r"^router_target needs a class for each expert: there are 11 experts and 10 classes$"):
        train(tiny(router_target=target, num_experts=11), splits, tmp_path / "run", Recorder())


def test_too_many_classes_are_refused(tiny, splits, tmp_path):
    splits_of_300_classes = replace(splits, spec=replace(splits.spec, classes=tuple(map(str, range(300)))))
    with pytest.raises(UserError, match=r"^router_target confusion takes at most 256 classes, not 300$"):
        train(tiny(router_target="confusion"), splits_of_300_classes, tmp_path / "run", Recorder())

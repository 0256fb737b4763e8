"""No two processes evaluate the same shards of a store; others work beside each other."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from advmoe.errors import UserError
from advmoe.evaluation import evaluate
from advmoe.evaluation.claim import claimed

PARTS = [(number, count) for count in range(1, 7) for number in range(count)]


def is_refused(store: Path, part: tuple[int, int]) -> bool:
    try:
        with claimed(store, part):
            return False
    except UserError:
        return True


def test_exactly_the_parts_that_share_a_shard_are_refused(tmp_path: Path) -> None:
    for first in PARTS:
        with claimed(tmp_path / "evaluation", first):
            refused = [part for part in PARTS if is_refused(tmp_path / "evaluation", part)]
        assert refused == [part for part in PARTS if set(range(60)[first[0] :: first[1]]) & set(range(60)[part[0] :: part[1]])]


@pytest.mark.parametrize(
    ("part", "activity"),
    [((0, 1), "evaluating in this folder"), ((1, 2), "evaluating part 1 2 in this folder")],
)
def test_the_message_names_the_process_and_its_part(tmp_path: Path, part: tuple[int, int], activity: str) -> None:
    store = tmp_path / "run/evaluation"
    message = rf"^{store}: process \d+ on \S+ is already {activity}; wait"
    with claimed(store, part), pytest.raises(UserError, match=message), claimed(store):
        pass


def test_other_stores_and_evaluations_without_a_store_are_free(tmp_path: Path) -> None:
    with claimed(tmp_path / "evaluation"), claimed(tmp_path / "evaluation-cifar10.1"), claimed(None), claimed(None):
        pass
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_claim_of_a_killed_process_is_void_and_its_file_is_removed(tmp_path: Path) -> None:
    for name in (".evaluation.1-of-3.lock", ".evaluation.0-of-1.lock"):
        (tmp_path / name).write_text("process 7 on node\n")
    with claimed(tmp_path / "evaluation", (1, 2)):
        assert [path.name for path in tmp_path.iterdir()] == [".evaluation.1-of-2.lock"]
    assert not list(tmp_path.iterdir())


def test_a_store_in_a_folder_that_cannot_be_written_is_not_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a volume that is mounted below `/`: the store itself can be written."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with claimed(tmp_path / "evaluation"), claimed(tmp_path / "evaluation"):
        assert not list(tmp_path.iterdir())


def test_evaluate_claims_the_shards_of_its_store(tmp_path: Path) -> None:
    model, store = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), tmp_path / "store"
    x, y = torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.long)

    def run(part: tuple[int, int] = (0, 1), folder: Path | None = store) -> None:
        evaluate(model, x, y, epsilon=0.1, preset=["pgd_10"], store=folder, part=part, shard_size=2)

    with claimed(store, (0, 2)):
        with pytest.raises(UserError, match="is already evaluating part 0 2"):
            run()
        assert not store.exists()
        run(part=(1, 2))
        run(folder=None)
        assert [path.name for path in store.glob("shard-*")] == ["shard-00001.json"]
    run()

"""Which split a file belongs to, by its name."""

from pathlib import Path

import pytest

from advmoe.data.shards import files_by_split
from advmoe.errors import UserError

DATA = Path("data")


def splits(*names: str) -> dict[str, list[str]]:
    files = files_by_split(DATA, [DATA / name for name in names])
    return {split: [path.relative_to(DATA).as_posix() for path in paths] for split, paths in files.items()}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.parquet", "train"),
        ("cifar10_train.parquet", "train"),
        ("naval-train-000000.tar", "train"),
        ("image-retrieval-val-000000.tar", "val"),
        ("Constrained.Validation.07.tar", "val"),
        ("imagenet1k-valid-0.tar", "val"),
        ("test-00000-of-00001-0123456789abcdef.parquet", "test"),
        ("train2017-000000.tar", "train"),
        ("plain_text/test/0000.parquet", "test"),
        ("val/train-0.parquet", "train"),  # the file's name comes first
        ("set-trainval-000000.tar", None),
        ("training_noisy.parquet", None),
        ("contest/0000.parquet", None),
        ("naval-000000.tar", None),
    ],
)
def test_the_split_is_a_complete_word_of_the_name(name: str, split: str | None) -> None:
    assert splits(name) == ({} if split is None else {split: [name]})


@pytest.mark.parametrize("name", ["val-train-000000.tar", "train_test/0000.parquet"])
def test_a_name_that_fits_two_splits_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"^data/{name}: its name fits the splits t"):
        splits(name)


def test_shards_are_in_the_order_of_their_numbers() -> None:
    assert splits("train-10.tar", "train-9.tar", "val-1.tar", "train-8.tar") == {
        "train": ["train-8.tar", "train-9.tar", "train-10.tar"],
        "val": ["val-1.tar"],
    }


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-0.parquet", "plain_text/train-0.parquet"),
        ("partial-train/0000.parquet", "train/0000.parquet"),
        ("train.parquet", "train_noisy.parquet"),
        ("a-train-000.tar", "b-train-001.tar"),
        ("train-0.parquet", "train.parquet"),
        ("val-0.tar", "validation-1.tar"),
        ("train-00000-of-00001.parquet", "train-00000-of-00002.parquet"),
    ],
)
def test_two_sets_of_files_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=rf"data/{names[0]} and {names[1]}: two sets of files for the \w+ split"):
        splits(*names)


def test_a_shard_that_occurs_twice_or_is_missing_is_refused() -> None:
    with pytest.raises(UserError, match=r"train-0\.tar and train-00.tar: two files with the same shard number"):
        splits("train-0.tar", "train-00.tar")
    with pytest.raises(UserError, match=r"train-00000-of-00003.parquet: shard 1 of 3 is missing"):
        splits("train-00000-of-00003.parquet", "train-00002-of-00003.parquet")

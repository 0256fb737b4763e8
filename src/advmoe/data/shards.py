"""Files that hold one split of a data set, complete or in numbered shards, recognised by their names.

A file belongs to a split if its name contains the split as a separate word (cifar10-train.parquet, small-val-000001.tar), or else
the name of the folder around it does (train/0000.parquet). Words are separated by anything but letters: "naval-train" is a
training shard, and "trainval" or "training" names no split.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

from advmoe.errors import UserError

SPLIT_OF_WORD = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SHARD = re.compile(r"(?P<set>.*?)[-_.]?(?P<number>\d+)(?:-of-(?P<count>\d+))?(?:-[0-9a-f]{16})?")  # and a hash, as the hub adds


def files_by_split(folder: Path, files: Iterable[Path]) -> dict[str, list[Path]]:
    """The files of each split, in the order of their shards; files of no split are ignored.

    Raises UserError if a name fits two splits, if the files of a split belong to two sets, if a shard occurs twice, or if a shard
    is missing although the names give their number (00000-of-00002).
    """
    files_of: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        split = _split_of(path.relative_to(folder), path)
        if split is not None:
            files_of[split].append(path)
    return {split: _one_set(folder, split, sorted(paths)) for split, paths in files_of.items()}


def _split_of(name: PurePath, path: Path) -> str | None:
    """The split that the nearest component of a path names, from the file upwards."""
    for component in reversed(name.with_suffix("").parts):
        words = re.findall(r"[^\W\d_]+", component.casefold())
        splits = sorted({SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD})
        if len(splits) > 1:
            raise UserError(f"{path}: its name fits the splits {' and '.join(splits)}; rename it")
        if splits:
            return splits[0]
    return None


def _one_set(folder: Path, split: str, paths: list[Path]) -> list[Path]:
    """The paths in the order of their numbers, checked to be the shards of one set."""
    sets: dict[tuple[Path, str, bool, str | None], list[Path]] = defaultdict(list)
    numbers: dict[Path, int] = {}
    for path in paths:
        match = SHARD.fullmatch(path.stem)
        numbers[path] = int(match["number"]) if match else 0
        name, count = (match["set"], match["count"]) if match else (path.stem, None)
        sets[path.parent, name, match is None, count].append(path)
    if len(sets) > 1:
        first, second = (next(iter(group)) for group in list(sets.values())[:2])
        raise UserError(
            f"{first} and {second.relative_to(folder)}: two sets of files for the {split} split, which would be counted together; "
            f"keep one of them in {folder}"
        )
    ((*_, count),) = sets
    _check_numbers(paths, numbers, count)
    return sorted(paths, key=numbers.__getitem__)


def _check_numbers(paths: list[Path], numbers: Mapping[Path, int], count: str | None) -> None:
    by_number: dict[int, Path] = {}
    for path in paths:
        if numbers[path] in by_number:
            raise UserError(f"{by_number[numbers[path]]} and {path.name}: two files with the same shard number; keep one of them")
        by_number[numbers[path]] = path
    missing = sorted(set(range(int(count))) - by_number.keys()) if count else []
    if missing:
        raise UserError(f"{paths[0]}: shard {missing[0]} of {int(count or 0)} is missing")

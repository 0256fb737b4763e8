"""The claim of a process on the shards that it evaluates, so that no two processes work on the same ones.

STORE is the folder with the results, RUN/evaluation for a run. The files of a claim are beside it, because `--fresh` deletes STORE:

RUN/.evaluation.lock         locked for the moment in which a process makes its claim
RUN/.evaluation.1-of-3.lock  locked while a process evaluates every third shard, starting at shard 1; 0-of-1: all shards

Both are removed afterwards. If their folder cannot be written, nothing is claimed.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from advmoe.locks import locked, turn

Part = tuple[int, int]  # (i, k): every k-th shard, starting at i


@contextmanager
def claimed(store: Path | None, part: Part = (0, 1)) -> Iterator[None]:
    """Claim `part` of the shards in the folder `store` during the block; without a folder, nothing is claimed.

    Raises UserError, which names the other process, if it evaluates any of these shards.
    """
    if store is None:
        yield
        return
    folder, name = store.absolute().parent, f".{store.absolute().name}"
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # the store may be a volume that is mounted there
        yield
        return
    with ExitStack() as stack:
        with turn(folder / f"{name}.lock"):
            for path, other in _claims(folder, name):
                if _overlap(part, other):
                    with locked(path, store, _activity(other)):
                        pass  # the process that made this claim was killed
            stack.enter_context(locked(folder / f"{name}.{part[0]}-of-{part[1]}.lock", store, _activity(part)))
        yield


def _claims(folder: Path, name: str) -> list[tuple[Path, Part]]:
    """The files of all claims on a store, with their parts."""
    matches = [(path, re.fullmatch(rf"{re.escape(name)}\.(\d+)-of-(\d+)\.lock", path.name)) for path in folder.iterdir()]
    return [(path, (int(match[1]), int(match[2]))) for path, match in matches if match]


def _overlap(part: Part, other: Part) -> bool:
    """Whether two parts have a shard in common."""
    return (part[0] - other[0]) % math.gcd(part[1], other[1]) == 0


def _activity(part: Part) -> str:
    what = "evaluating in this folder" if part == (0, 1) else f"evaluating part {part[0]} {part[1]} in this folder"
    return f"{what}; wait for it to finish"

"""Results of an evaluation on disk: one file per shard of images, and a key that identifies the evaluation."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from advmoe import migrations
from advmoe.config.choices import SHARD_SIZE
from advmoe.errors import UserError
from advmoe.evaluation.record_evaluation import Check
from advmoe.files import JsonObject, write_json

T = TypeVar("T")
OrNull = Annotated[T, BeforeValidator(lambda value: [] if value is None else value)]  # null is read as an empty list
CHECKS = TypeAdapter(dict[str, Check])
STORE = "evaluation"  # in the folder of a run
KEY = "key.json"  # in a store: its StoreKey
OF_FIELDS = {  # field of a StoreKey that differs -> what the store holds, for the error message
    "schema": "results of another version of advmoe, which cannot be continued",
    "network": "results of another network", "data": "results on other test images (another data set or --limit-test)",
    "predictions": "results of a network with other predictions", "answers": "results of a network with other logits or gradients",
}  # fmt: skip
CLOSE = 0.01  # difference of answers that may be due to rounding on another machine, relative to the image's largest answer
FLIPPED = 1 / 16  # fraction of the images that may differ more: rounding can send an image to another expert


class StoreKey(BaseModel):
    """What stored results depend on, besides attack and shard: digests of the network, the data and the predicted classes, what the
    network computes near some images (`answers`, one list of numbers for each), the threat model, the seed, the precision of the
    attacks' gradients, and the size of the shards."""

    schema_number: int = Field(alias="schema")
    network: str
    data: str
    predictions: str
    answers: list[list[float]]
    epsilon: float
    norm: str
    seed: int
    search: Literal["bfloat16", "float32"]
    shard_size: int


class AttackRun(BaseModel):
    """The result of one attack on a shard: the `rows` attacked, those that are `broken`, and the number of invalid x' (`outside`).

    `held`: for an attack that fixes pathways (with `pathway_budget`), the rows whose x' fools the network with a fixed pathway.
    `transfer`: digest of the network that the attack was transferred from. `version`: version of the attack. `seconds`: wall time.
    `cpu_seconds`: processor time.
    """

    model_config = ConfigDict(extra="forbid")

    rows: list[int]
    transfer: str | None
    broken: list[int]
    held: list[int] | None = None
    outside: int
    seconds: float
    cpu_seconds: float | None = None
    pathway_budget: int | None = None
    version: int = 1

    def plus(self, other: "AttackRun") -> "AttackRun":
        """This result with that of the same attack on other rows."""
        joined = {}
        for name in ("rows", "broken", "held", "outside", "seconds", "cpu_seconds"):
            values = (getattr(self, name), getattr(other, name))
            joined[name] = None if None in values else values[0] + values[1]
        return self.model_copy(update=joined)


class RoutingCounts(BaseModel):
    """Counts over a shard's images, and rows of some (see `advmoe.evaluation.routing.routing_counts`).

    Stores of older schemas, whose progress can be shown, lack the fields with a default, or have null there.
    """

    model_config = ConfigDict(extra="forbid")

    images: int
    correct: int
    flipped: int
    overlap: list[int]
    load: list[list[int]]
    load_adv: list[list[int]]
    router: int
    expert: int
    fixed: list[int]
    fixed_robust: list[int]
    gained: OrNull[list[int]] = []
    lost: OrNull[list[int]] = []
    kept: OrNull[list[list[int]]] = []
    versions: list[int] = []


class Shard(BaseModel):
    """The results of one shard so far. Rows are numbers in the test set. `ever` are the rows that any attack of any plan broke."""

    model_config = ConfigDict(extra="forbid")

    rows: list[int]
    correct: list[int] | None = None
    attacks: dict[str, AttackRun] = {}
    routing: RoutingCounts | None = None
    ever: list[int] = []

    def broken(self, names: Sequence[str]) -> set[int]:
        """Rows that any of these attacks broke."""
        return {row for name in names if name in self.attacks for row in self.attacks[name].broken}


class Store:
    """Shards on disk; without a folder, nothing is stored. Raises UserError if the folder holds results of another key."""

    def __init__(self, folder: Path | None, key: StoreKey) -> None:
        self.folder = folder
        self._checks: dict[str, Check] = {}  # in memory, if there is no folder
        if folder is None:
            return
        # before the look at the key, which another process may write now
        holds_results = any(folder.glob("shard-*.json")) or (folder / "checks.json").exists()
        path = folder / KEY
        if path.exists():
            _check_key(_read_key(folder), key.model_dump(by_alias=True), folder)
        elif holds_results:
            raise UserError(f"{folder}: holds results without {KEY}, so it is not known of which network; delete them by --fresh")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, key.model_dump(by_alias=True))

    def load(self, number: int, rows: list[int]) -> Shard:
        """The results of the shard so far. Raises UserError if its file is damaged."""
        path = self._path(number)
        if path is None or not path.exists():
            return Shard(rows=rows)
        shard = _shard(path)
        if shard.rows != rows:
            raise _wrong_shard(path)
        return shard

    def saver(self, number: int) -> Callable[[Shard], None]:
        """A function that writes shard `number`."""
        path = self._path(number)
        return lambda shard: None if path is None else _write(path, shard.model_dump())

    def checks(self, version: int) -> dict[str, Check]:
        """The checks of this version that are done. Raises UserError if their file is damaged."""
        if self.folder is None:
            return dict(self._checks)
        path = self.folder / "checks.json"
        content = _read(path) if path.exists() else {}
        try:
            return CHECKS.validate_python(content["checks"]) if content.get("version") == version else {}
        except (KeyError, ValidationError):
            raise UserError(f"{path}: not checks of an evaluation; remove it to run them anew") from None

    def save_checks(self, checks: Mapping[str, Check], version: int) -> None:
        """Keep the checks done so far."""
        if self.folder is None:
            self._checks = dict(checks)
        else:
            _write(self.folder / "checks.json", {"version": version, "checks": CHECKS.dump_python(dict(checks))})

    def _path(self, number: int) -> Path | None:
        return None if self.folder is None else self.folder / f"shard-{number:05d}.json"


def is_of_older_schema(folder: Path, schema: int) -> bool:
    """Whether the store in `folder` was written with a schema older than `schema`, so that it cannot be continued."""
    return (folder / KEY).exists() and int(_read_key(folder).get("schema", 0)) < schema


def stored_shards(folder: Path) -> Iterator[tuple[int, Shard]]:
    """The shards that a store holds so far, with their numbers. Other processes may still change them."""
    for path in sorted(folder.glob("shard-*.json")):
        yield int(path.stem.removeprefix("shard-")), _shard(path)


def remove_results(folder: Path) -> None:
    """Remove the results in a store, its key last, so that an interrupted removal leaves no results of an unknown network. Raises
    OSError if they cannot be removed."""
    if folder.exists():
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != KEY:
                path.unlink()
        (folder / KEY).unlink(missing_ok=True)
        if not folder.is_symlink():
            folder.rmdir()


def shard_count(images: int, size: int = SHARD_SIZE) -> int:
    """The number of shards for `images` images."""
    return -(-images // size)


def split(count: int, size: int) -> list[list[int]]:
    """Rows 0 to count - 1 in shards of `size`."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def _shard(path: Path) -> Shard:
    try:
        return Shard.model_validate(migrations.renamed(_read(path)))
    except ValidationError:
        raise _wrong_shard(path) from None


def _wrong_shard(path: Path) -> UserError:
    return UserError(f"{path}: not a shard of these images; remove it to run it anew")


def _check_key(stored_key: JsonObject, key: JsonObject, folder: Path) -> None:
    for name, value in key.items():
        stored = stored_key.get(name)
        if not (_answers_alike(stored, value) if name == "answers" else stored == value):
            content = OF_FIELDS.get(name, f"shards of another {name} ({stored}, not {value})")
            raise UserError(f"{folder}: holds {content}; give this evaluation a --name, or delete those results by --fresh")


def _answers_alike(stored: Any, answers: list[list[float]]) -> bool:
    """Whether one network can have given both, on machines that round differently."""
    pairs = list(zip(stored, answers, strict=True))
    return sum(not _close(*pair) for pair in pairs) <= FLIPPED * len(pairs)


def _close(stored: list[float], answers: list[float]) -> bool:
    slack = CLOSE * max(map(abs, answers))
    return all(abs(one - other) <= slack for one, other in zip(stored, answers, strict=True))


def _read_key(folder: Path) -> JsonObject:
    return _read(folder / KEY, "delete the results beside it by --fresh")


def _read(path: Path, remedy: str = "remove it to run it anew") -> JsonObject:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); {remedy}") from None
    if not isinstance(content, dict) or content.pop("seal", None) != _seal(content):
        raise UserError(f"{path}: is damaged (its seal does not fit); {remedy}")
    return content


def _write(path: Path, content: JsonObject) -> None:
    write_json(path, {**content, "seal": _seal(content)})


def _seal(content: JsonObject) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

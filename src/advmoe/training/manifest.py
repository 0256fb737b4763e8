"""The content of a checkpoint's manifest.json, as pydantic models. After reading, all values are present and in their range."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NotRequired, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from typing_extensions import TypedDict

from advmoe import migrations
from advmoe.data.images import Spec
from advmoe.errors import UserError
from advmoe.files import JsonObject, bounded_text

SCHEMA = 2  # in schema 1 "image" was called "picture"
MAX_BYTES = 2**26
WEIGHTS, STATES = FILES = ("model.safetensors", "optimizers.pt")  # beside the manifest

LARGEST = 1e15  # figures are smaller
Figure = Annotated[float, Field(gt=-LARGEST, lt=LARGEST, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**31)]


class EpochRow(TypedDict):
    """An epoch, as in a line of metrics.jsonl: accuracies in percent, times in seconds, and other figures of the loss.

    `score` selects the best epoch of a phase. `load` [L, N] is each expert's share of the images in each layer, `dead` lists the
    experts of each layer without images, `router_cosine` [L] says how far each router has turned from its start
    (`advmoe.training.health.router_cosines`), `teacher` is the digest of the teacher's weights, and `generated` that of the
    generated images. `advmoe` and `commit` are the version and the commit of the code that finished the epoch. Rows of older
    versions may lack all fields except `phase`, `score`, `epoch` and `iterations`.
    """

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    phase: int
    score: Figure
    epoch: NotRequired[int]
    iterations: NotRequired[int]
    train_seconds: NotRequired[Figure]
    validate_seconds: NotRequired[Figure]
    val_sa: NotRequired[Figure]
    val_ra: NotRequired[Figure]
    loss: NotRequired[Figure]
    load: NotRequired[list[list[float]]]
    dead: NotRequired[list[list[int]]]
    router_cosine: NotRequired[list[float]]
    teacher: NotRequired[str]
    generated: NotRequired[str]
    advmoe: NotRequired[str]
    commit: NotRequired[str]


History = list[EpochRow]


class Partial(BaseModel):
    """An unfinished epoch: the iterations done, the number of images of each rank, the seconds, each rank's sums of metrics by
    name, and the digests that its row of the history will have (`teacher`, `generated`). Older versions wrote no digests."""

    model_config = ConfigDict(frozen=True)

    iteration: Count
    images: Annotated[list[Annotated[int, Field(ge=0, lt=2**62)]], Field(min_length=1)]
    seconds: Figure
    sums: dict[str, JsonValue]
    digests: dict[str, str] = {}

    @model_validator(mode="after")
    def _one_sum_per_rank(self) -> Self:
        if any(len(torch.tensor(value)) != len(self.images) for value in self.sums.values()):
            raise ValueError("a sum for each rank is missing")
        return self


@dataclass(frozen=True)
class Progress:
    """How far a run is: its `history`, the unfinished epoch after it, and the number of returns to a checkpoint after a NaN."""

    history: History
    partial: Partial | None = None
    restores: int = 0


class Manifest(BaseModel):
    """A checkpoint after `epoch` epochs, and `partial` of the next one. `restores` counts returns to a checkpoint after a NaN."""

    version: int = Field(default=SCHEMA, alias="schema", ge=1, le=SCHEMA)
    epoch: Count
    fingerprint: str
    history: History
    spec: Spec | None = None
    partial: Partial | None = None
    restores: Count = 0
    sha256: dict[str, str]

    @field_validator("history", mode="wrap")
    @classmethod
    def _as_written(cls, rows: History, check: ValidatorFunctionWrapHandler) -> History:
        """Check the rows, and return them with their fields in the order of the file."""
        check(rows)
        return rows

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.epoch != len(self.history) or not (self.history or self.partial):
            raise ValueError("epoch and history disagree")
        if set(self.sha256) != set(FILES):  # other names could lead outside the folder
            raise ValueError("checksums of other files")
        return self

    def sealed(self) -> str:
        """The text of the file: JSON that includes its checksum."""
        tree = self.model_dump(by_alias=True, exclude_none=True)
        return json.dumps({**tree, "seal": seal(tree)})


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in a checkpoint's folder, or None if it is missing, damaged or of another program.

    Raises UserError if it is intact and of a newer schema.
    """
    try:
        tree = json.loads(bounded_text(folder / "manifest.json", MAX_BYTES))
        if not migrations.is_unsealed(tree) and tree.pop("seal") != seal(tree):
            return None
        newer = type(tree["schema"]) is int and tree["schema"] > SCHEMA
    except Exception:
        return None
    if newer:
        raise UserError(f"{folder}: is of schema {tree['schema']}; this advmoe reads 1 to {SCHEMA}: a newer one is needed")
    try:
        if tree["schema"] == 1:
            tree = migrations.renamed(tree)
        return Manifest.model_validate({**tree, "history": migrations.history(tree["history"])})
    except Exception:  # hostile values whose checksum is right raise nearly any exception
        return None


def seal(tree: JsonObject) -> str:
    """The checksum of a manifest without its seal."""
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()

"""A Record: the results of an evaluation, the cost of the network, and their origin, as a pydantic model.

`record_schema` describes the JSON of record.json; docs/record.schema.json contains the same. The sections of a Record are in
`record_evaluation`, `record_config` and `record_snapshot`, the types of its fields in `record_fields`. `record_file` reads and
writes Records.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError

from advmoe.evaluation.record_config import RecordedConfig
from advmoe.evaluation.record_evaluation import EvaluationResult
from advmoe.evaluation.record_fields import (
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    Percent,
    Positive,
    RecordModel,
    Seed,
    Size,
    Text,
    ValidValues,
    Value,
)
from advmoe.evaluation.record_snapshot import EpsilonCurve, GalleryImage, Layer, Loads
from advmoe.files import JsonObject
from advmoe.moved import getter

SCHEMA = 3  # in schema 2 "image" was called "picture", and the figures of an evaluation were not a separate section


class HistoryRow(RecordModel):
    """An epoch: accuracies on held-out images in percent, losses, learning rate, each expert's load per layer, and how far each
    layer's router has turned from its start (1: not at all)."""

    sparse: ClassVar[frozenset[str]] = frozenset({"loss", "router_loss", "lr", "load", "router_cosine"})
    epoch: NonNegativeInt
    phase: NonNegativeInt
    val_sa: Percent
    val_ra: Percent
    loss: Number | None = None
    router_loss: Number | None = None
    lr: Number | None = None
    load: Annotated[list[Annotated[list[Number], Field(fail_fast=True)]], Field(fail_fast=True)] | None = None
    router_cosine: Annotated[list[Number], Field(fail_fast=True)] | None = None


class RecordedTeacher(RecordModel):
    """The network whose probabilities the run learned from: the path in its configuration, and the digest of its weights."""

    path: Text
    weights: Text


class RecordedCode(RecordModel):
    """The code that trained a network: the version of the package and, in a checkout, its commit; None if it is not known."""

    sparse: ClassVar[frozenset[str]] = frozenset({"advmoe", "commit"})
    advmoe: Text | None = None
    commit: Text | None = None

    @property
    def words(self) -> str:
        """'advmoe 0.1.0, commit b999d11'."""
        return f"advmoe {self.advmoe or 'unknown'}, commit {self.commit or 'unknown'}"


class Record(RecordModel):
    """The results of an evaluation, the cost of the network, and their origin. Accuracies are in percent of `test_images`.

    `ra`: accuracy under PGD by number of steps. A Record has `ra_worst` if AutoAttack and the attacks on routing were run, and
    `ra_worst_quick` otherwise. `gmacs` is the ideal count. `run` is the name of the run's folder. `weights` is the digest of the
    network (`advmoe.models.digest`), None in Records of schemas 1 and 2. `attack_precision` is the data type of attacks'
    gradients, None in Records that do not say it. `trained_by` is the code that trained the network, in order if
    there were several; None if it is not known. `advmoe` and `commit` are those of the evaluation. `from_schema` is the schema of
    the file if it is older.
    """

    sparse: ClassVar[frozenset[str]] = frozenset(
        {
            "ra_aa",
            "ra_aa_plus",
            "ra_aa_rand",
            "ra_worst",
            "ra_worst_quick",
            "from_schema",
            "teacher",
            "attack_precision",
            "trained_by",
        }
    )
    schema_number: Literal[3] = Field(3, alias="schema")
    from_schema: NonNegativeInt | None = None
    run: Text | None = None
    method: Text
    backbone: Text
    dataset: Text
    sa: Percent
    ra: dict[Text, Percent]
    ra_aa: Percent | None = None
    ra_aa_plus: Percent | None = None
    ra_aa_rand: Percent | None = None
    ra_worst: Percent | None = None
    ra_worst_quick: Percent | None = None
    epsilon: NonNegativeFloat
    norm: Text
    gmacs: Positive
    gmacs_executed: NonNegativeFloat
    gmacs_dense: Positive
    reduction: Number
    params: NonNegativeInt
    epoch: NonNegativeInt
    train_images: NonNegativeInt
    test_images: Size
    fingerprint: Text
    weights: Text | None = None
    teacher: RecordedTeacher | None = None
    seed: Seed
    attack_seed: Seed
    attack_precision: Annotated[Literal["float32", "bfloat16"] | None, ValidValues("float32 or bfloat16")] = None
    config: RecordedConfig
    train_seconds: NonNegativeFloat
    evaluate_seconds: NonNegativeFloat
    evaluation: EvaluationResult
    history: Annotated[list[HistoryRow], Field(fail_fast=True)] = Field([])
    classes: Annotated[list[Text], Field(fail_fast=True)] = Field([])
    layers: Annotated[list[Layer], Field(fail_fast=True)] = Field([])
    load_by_class: Loads = Field([])
    epsilon_curve: EpsilonCurve | None = None
    gallery: Annotated[list[GalleryImage], Field(fail_fast=True)] = Field([])
    trained_by: Annotated[list[RecordedCode], Field(fail_fast=True)] | None = None
    advmoe: Text | None = None
    commit: Text | None = None
    versions: dict[Text, Text] | None = None
    hardware: dict[Text, Value] | None = None
    time: Text

    @field_validator("gallery", mode="after")
    @classmethod
    def _images_fit(cls, images: list[GalleryImage], info: ValidationInfo) -> list[GalleryImage]:
        """Compare the images with the class names and layers, if these are valid."""
        if not all(image.fits(info.data.get("classes", []), info.data.get("layers", [])) for image in images):
            raise PydanticCustomError("words", "images of the Record's classes and layers")
        return images

    @model_validator(mode="after")
    def _has_a_worst_case(self) -> Self:
        if self.ra_worst is None and self.ra_worst_quick is None:
            raise PydanticCustomError("record", "ra_worst is missing")
        return self

    @property
    def worst(self) -> float:
        """RA-worst, or RA-worst (quick) if not all attacks were run."""
        worst = self.ra_worst_quick if self.ra_worst is None else self.ra_worst
        assert worst is not None  # _has_a_worst_case
        return worst

    @property
    def worst_interval(self) -> tuple[float, float]:
        """The 95 % interval of `worst`, in percent; 0 to 100 if the Record has none."""
        return self.evaluation.intervals.get("ra_worst_quick" if self.ra_worst is None else "ra_worst", (0.0, 100.0))

    @property
    def trained_by_words(self) -> str:
        """'advmoe 0.1.0, commit b999d11; then advmoe 0.2.0, commit unknown'."""
        return "; then ".join(code.words for code in self.trained_by or [RecordedCode()])

    def to_json(self) -> JsonObject:
        """The content of record.json."""
        return self.model_dump(mode="json", by_alias=True)

    def without_images(self) -> "Record":
        """The same Record without its gallery, so that it can be shared without images of the data set."""
        return self.model_copy(update={"gallery": []})


def record_schema() -> JsonSchemaValue:
    """The JSON Schema of record.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Record.model_json_schema(by_alias=True)}


if not TYPE_CHECKING:
    __getattr__ = getter(__name__)

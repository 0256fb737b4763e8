"""A Record: what a network withstands and costs, with what made it, as pydantic models.

`record_schema` describes the JSON of record.json; docs/record.schema.json holds it. Numbers are finite and within
1e15, and true and false are not numbers. `advmoe.evaluation.record_file` reads and writes Records.
"""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeGuard

from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

SCHEMA = 3  # 2 said "picture" where 3 says "image", and had an evaluation's figures beside its other fields
LARGEST = 1e15
MOST_EXPERTS = 1000
MOST_PIXELS = 4_000_000
Status = Literal["pass", "warn", "fail", "skipped"]


# Types of fields


@dataclass(frozen=True)
class Words:
    """What a field must hold, in words: part of the error message and of the JSON Schema."""

    text: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
            try:
                return inner(value)
            except (ValidationError, OverflowError):
                raise PydanticCustomError("words", "{words}", {"words": self.text}) from None

        return core_schema.no_info_wrap_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "description": self.text}


def is_number(value: Any, least: float = -LARGEST, most: float = LARGEST) -> TypeGuard[int | float]:
    """Whether a value from JSON is a finite number in [least, most]. True and false are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | str) or is_number(value):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise ValueError


def _png(value: str) -> str:
    """Raises where it is not the base64 of a grey or RGB PNG that can be decoded."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(value, validate=True)), formats=["PNG"]) as file:
            if file.mode not in ("L", "RGB") or file.width * file.height > MOST_PIXELS:
                raise ValueError
            file.load()
    except Exception:  # decoders raise many kinds of errors on broken bytes
        raise ValueError from None
    return value


Number = Annotated[float, Field(strict=True, ge=-LARGEST, le=LARGEST), Words("a number")]
Percent = Annotated[float, Field(strict=True, ge=0, le=100), Words("a number from 0 to 100")]
NotNegative = Annotated[float, Field(strict=True, ge=0, le=LARGEST), Words("a number of at least 0")]
Positive = Annotated[float, Field(strict=True, gt=0, le=LARGEST), Words("a number above 0")]
Scale = Annotated[float, Field(strict=True, gt=0, le=1), Words("a number in (0, 1]")]
Share = Annotated[float, Field(strict=True, ge=0, le=1.001), Words("a number from 0 to 1")]  # float32 may exceed 1 by a hair
Whole = Annotated[int, Field(strict=True, ge=0, le=LARGEST), Words("a whole number of at least 0")]
Size = Annotated[int, Field(strict=True, ge=1, le=LARGEST), Words("a whole number of at least 1")]
Seed = Annotated[int, Field(strict=True, ge=-LARGEST, le=LARGEST), Words("a whole number")]
Experts = Annotated[int, Field(strict=True, ge=1, le=MOST_EXPERTS), Words(f"a whole number from 1 to {MOST_EXPERTS}")]
Text = Annotated[str, Field(strict=True), Words("text")]
Png = Annotated[str, Field(strict=True), AfterValidator(_png), Words("a grey or RGB PNG in base64")]
Setting = Annotated[Any, AfterValidator(_plain), Words("null, true, false, text, a number, or a list of these")]
Counts = Annotated[list[Whole], Field(fail_fast=True)]


class Part(BaseModel):
    """A model whose fields named in `sparse` are left out of the JSON where they are None."""

    model_config = ConfigDict(extra="ignore", validate_assignment=False, protected_namespaces=())
    sparse: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_absent(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = inner(self)
        return {name: value for name, value in content.items() if value is not None or name not in self.sparse}


# Parts of a Record


class AttackTotals(Part):
    """What one attack did to all images: how many it attacked and broke, in how many seconds. `version` is the attack's."""

    attacked: Whole
    broken: Whole
    seconds: NotNegative
    version: Size = 1


class CheckResult(Part):
    """One self-check of the evaluation; `number` is the one in docs/evaluation.md."""

    number: Whole
    name: Text
    status: Annotated[Status, Words("pass, warn, fail or skipped")]
    detail: Text


class Difference(Part):
    """A difference in points and its 95 % interval."""

    value: Number
    low: Number
    high: Number


class RoutingFigures(Part):
    """Shares of all images in percent, but `flip_rate` and `overlap` [L]: of the correct ones. Loads are counts [L, N].

    `ra_router`: right on the clean image over the adversarial image's route; `ra_expert`: right on the adversarial image over
    the clean image's route; `fixed_expert_*` [N]: clean, and under PGD-10, with expert e in every layer. `choice_gain` [N] is
    what choosing an expert is worth: RA-10 of the routed network less that of the fixed expert e, on the same images.
    """

    ra_router: Percent
    ra_expert: Percent
    flip_rate: Percent
    overlap: Annotated[list[Percent], Field(fail_fast=True)] = []
    load: Annotated[list[Counts], Field(fail_fast=True)] = []
    load_adv: Annotated[list[Counts], Field(fail_fast=True)] = []
    fixed_expert_sa: Annotated[list[Percent], Field(fail_fast=True)] = []
    fixed_expert_ra: Annotated[list[Percent], Field(fail_fast=True)] = []
    choice_gain: Annotated[list[Difference], Field(fail_fast=True)] = []


class EvaluationResult(Part):
    """What an evaluation found on its images. `figures` in percent, worst case first, `intervals` their 95 % Wilson intervals.

    `complete`: AutoAttack was run and, on a network that routes, attacks on the routing. `left_out`: attack -> why it was not run.
    `flags` has a 1 for each image that nothing broke; `broken`: attack -> rows of the images that it broke.
    """

    images: Whole
    figures: dict[Text, Percent]
    complete: bool = False
    intervals: dict[Text, tuple[Percent, Percent]]
    attacks: dict[Text, AttackTotals] = {}
    left_out: dict[Text, Text] = {}
    routing: RoutingFigures | None = None
    checks: Annotated[list[CheckResult], Field(fail_fast=True)]
    flags: Text = ""
    broken: dict[Text, Counts] = {}

    @property
    def autoattack_unreliable(self) -> bool:
        """Whether check 5 found RA-AA too far above RA-worst to be trusted."""
        return any(check.number == 5 and check.status == "fail" for check in self.checks)


class HistoryRow(Part):
    """An epoch: accuracies on held-out images in percent, losses, learning rate, and each expert's load per layer."""

    sparse: ClassVar[frozenset[str]] = frozenset({"loss", "router_loss", "lr", "load"})
    epoch: Whole
    phase: Whole
    val_sa: Percent
    val_ra: Percent
    loss: Number | None = None
    router_loss: Number | None = None
    lr: Number | None = None
    load: Annotated[list[Annotated[list[Number], Field(fail_fast=True)]], Field(fail_fast=True)] | None = None


class Layer(Part):
    """An MoE layer; `width` is the number of filters of one expert, `size` the output's [h, w]."""

    name: Text
    in_channels: Size
    width: Size
    size: Annotated[list[Size], Field(min_length=2, fail_fast=True)]
    experts: Experts


class EpsilonCurve(Part):
    """Accuracy in percent of `images` images under one attack, at several epsilons."""

    attack: Text
    images: Size
    epsilons: Annotated[list[NotNegative], Field(min_length=1, fail_fast=True)]
    ra: Annotated[list[Percent], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if len(self.epsilons) != len(self.ra):
            raise PydanticCustomError("words", "an object with as many ra as epsilons")
        return self


class Seen(Part):
    """An image and what the network answers: class number, its softmax probability, and the expert chosen in each layer."""

    png: Png
    prediction: Whole
    confidence: Share
    route: Counts | None

    @property
    def pathway(self) -> list[int]:
        """The route, empty for a network that does not route."""
        return self.route or []


class GalleryImage(Part):
    """Test image number `row`, clean and under an attack."""

    row: Whole
    label: Whole
    attack: Text
    clean: Seen
    adversarial: Seen

    @model_validator(mode="after")
    def _routes_alike(self) -> Self:
        if len(self.clean.pathway) != len(self.adversarial.pathway):
            raise PydanticCustomError("words", "an image with two routes of one length")
        return self

    def fits(self, classes: list[str], layers: list[Layer]) -> bool:
        """Whether the Record's classes and layers have the classes and experts named here; where it has none, any fit."""
        labels = (self.label, self.clean.prediction, self.adversarial.prediction)
        if classes and max(labels) >= len(classes):
            return False
        return not layers or all(_route_fits(seen.pathway, layers) for seen in (self.clean, self.adversarial))


def _route_fits(route: list[int], layers: list[Layer]) -> bool:
    """One router may choose for all layers."""
    choices = route * len(layers) if len(route) == 1 else route
    pairs = zip(choices, layers, strict=False)
    return not route or (len(choices) == len(layers) and all(choice < layer.experts for choice, layer in pairs))


class Settings(Part):
    """One section of a configuration: the fields that reports read, and any other one as it was written."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Setting]


class ModelSettings(Settings):
    """The section `model`."""

    width: Size | None = None
    model_scale: Scale
    num_experts: Size


class AttackSettings(Settings):
    """The section `attack`: the attack in training."""

    epsilon: NotNegative
    num_steps: Whole


class TrainingSettings(Settings):
    """The section `training`."""

    epochs: Whole


def _section(value: Any) -> Any:
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, Mapping) else _plain(value)


class RecordedConfig(Part):
    """The run's configuration as it was written, by whatever version: every field is kept, those that reports read are typed."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(_section), Words("an object of settings, or a setting")]]
    model: ModelSettings
    attack: AttackSettings
    training: TrainingSettings

    def section(self, name: str) -> dict[str, Any]:
        """The fields of a section, none where the configuration lacks it."""
        section = self.model_dump().get(name)
        return section if isinstance(section, dict) else {}


def _rectangular(layers: list[list[list[int]]]) -> list[list[list[int]]]:
    """Raises where layers differ in their number of classes, or a layer's classes in their number of experts."""
    if len({len(layer) for layer in layers}) > 1 or not all(layer and len({len(row) for row in layer}) == 1 for layer in layers):
        raise ValueError
    return layers


def _none_is_empty(value: Any) -> Any:
    return [] if value is None else value


Loads = Annotated[
    list[list[Annotated[list[Whole], Field(min_length=1)]]],
    AfterValidator(_rectangular),
    BeforeValidator(_none_is_empty),
    Words("[L][classes][N] counts"),
]


class Record(Part):
    """What a network withstands and costs, with what made it. Accuracies in percent of `test_images`.

    `ra`: accuracy under PGD by number of steps. `ra_worst` is given only where AutoAttack and the attacks on routing were run, else
    `ra_worst_quick`. `gmacs` are ideal ones. `run` is the name of the run's folder. `weights` is the digest of the network
    (`advmoe.models.digest`), None in Records of schemas 1 and 2. `from_schema` is the older schema that the Record was written in.
    """

    sparse: ClassVar[frozenset[str]] = frozenset({"ra_aa", "ra_aa_plus", "ra_aa_rand", "ra_worst", "ra_worst_quick", "from_schema"})
    schema_number: Literal[3] = Field(3, alias="schema")
    from_schema: Whole | None = None
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
    epsilon: NotNegative
    norm: Text
    gmacs: Positive
    gmacs_executed: NotNegative
    gmacs_dense: Positive
    reduction: Number
    params: Whole
    epoch: Whole
    train_images: Whole
    test_images: Size
    fingerprint: Text
    weights: Text | None = None
    seed: Seed
    attack_seed: Seed
    config: RecordedConfig
    train_seconds: NotNegative
    evaluate_seconds: NotNegative
    evaluation: EvaluationResult
    history: Annotated[list[HistoryRow], Field(fail_fast=True)] = []
    classes: Annotated[list[Text], Field(fail_fast=True)] = []
    layers: Annotated[list[Layer], Field(fail_fast=True)] = []
    load_by_class: Loads = []
    epsilon_curve: EpsilonCurve | None = None
    gallery: Annotated[list[GalleryImage], Field(fail_fast=True)] = []
    advmoe: Text | None = None
    commit: Text | None = None
    versions: dict[Text, Text] | None = None
    hardware: dict[Text, Setting] | None = None
    time: Text

    @field_validator("gallery", mode="after")
    @classmethod
    def _images_fit(cls, images: list[GalleryImage], info: ValidationInfo) -> list[GalleryImage]:
        """Images are compared with the class names and layers where these are sound."""
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
        """RA-worst, or RA-worst (quick) where the full suite was not run."""
        worst = self.ra_worst_quick if self.ra_worst is None else self.ra_worst
        assert worst is not None  # _has_a_worst_case
        return worst

    def to_json(self) -> dict[str, Any]:
        """The content of record.json."""
        return self.model_dump(mode="json", by_alias=True)

    def without_images(self) -> "Record":
        """The same Record without its gallery: for what leaves the machine."""
        return self.model_copy(update={"gallery": []})


def record_schema() -> dict[str, Any]:
    """The JSON Schema of record.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Record.model_json_schema(by_alias=True)}

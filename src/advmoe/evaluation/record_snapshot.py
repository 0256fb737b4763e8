"""The snapshot's fields of a Record: MoE layers, loads by class, accuracy against epsilon, and images with their routes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from advmoe.evaluation.record_fields import (
    CountList,
    Experts,
    NonNegativeFloat,
    NonNegativeInt,
    Percent,
    Png,
    RecordedShare,
    RecordModel,
    Size,
    Text,
    ValidValues,
)
from advmoe.moved import getter

MAX_STEPS = 16  # largest number of steps of an image in the gallery


class Layer(RecordModel):
    """An MoE layer. `width` is the number of filters of one expert, `size` the output's [h, w]. `stage` is the number of its stage,
    from 0, if the layers of a stage share a router."""

    name: Text
    in_channels: Size
    width: Size
    size: Annotated[list[Size], Field(min_length=2, fail_fast=True)]
    experts: Experts
    stage: Annotated[int, Field(ge=0)] | None = None


class EpsilonCurve(RecordModel):
    """Accuracy under one attack at several epsilons, in percent of `images` images."""

    attack: Text
    images: Size
    epsilons: Annotated[list[NonNegativeFloat], Field(min_length=1, fail_fast=True)]
    ra: Annotated[list[Percent], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if len(self.epsilons) != len(self.ra):
            raise PydanticCustomError("words", "an object with as many ra as epsilons")
        return self


class View(RecordModel):
    """An image and the network's output: class number, its softmax probability, and the expert chosen in each layer."""

    png: Png
    prediction: NonNegativeInt
    confidence: RecordedShare
    route: CountList | None

    @property
    def pathway(self) -> list[int]:
        """The route, empty for a network that does not route."""
        return self.route or []


class GalleryStep(View):
    """An image under the gallery's attack at another epsilon than the evaluation's."""

    epsilon: NonNegativeFloat


class GalleryImage(RecordModel):
    """Test image number `row`: clean, under an attack at the evaluation's epsilon (`adversarial`), and at other epsilons (`steps`).
    Records of older versions have no steps."""

    row: NonNegativeInt
    label: NonNegativeInt
    attack: Text
    clean: View
    adversarial: View
    steps: Annotated[list[GalleryStep], Field(max_length=MAX_STEPS, fail_fast=True, default_factory=list)]

    @property
    def views(self) -> list[View]:
        """The clean image, the adversarial one, and those of the steps."""
        return [self.clean, self.adversarial, *self.steps]

    @model_validator(mode="after")
    def _routes_alike(self) -> Self:
        if len({len(view.pathway) for view in self.views}) > 1:
            raise PydanticCustomError("words", "an image with routes of one length")
        return self

    def fits(self, classes: list[str], layers: list[Layer]) -> bool:
        """Whether the Record's classes and layers have the classes and experts of this image. An empty list fits any."""
        labels = (self.label, *(view.prediction for view in self.views))
        if classes and max(labels) >= len(classes):
            return False
        return not layers or all(_route_fits(view.pathway, layers) for view in self.views)


def columns(layers: Sequence[Layer], route_length: int) -> list[int]:
    """The position of each layer's expert in a route, which has one entry for each layer, for each stage, or for the network."""
    if route_length == 1:
        return [0] * len(layers)
    return [number if layer.stage is None else layer.stage for number, layer in enumerate(layers)]


def _route_fits(route: list[int], layers: list[Layer]) -> bool:
    """Whether the layers have the experts of a route."""
    if not route:
        return True
    positions = columns(layers, len(route))
    experts_exist = (route[position] < layer.experts for position, layer in zip(positions, layers, strict=True))
    return set(positions) == set(range(len(route))) and all(experts_exist)


def _rectangular(layers: list[list[list[int]]]) -> list[list[list[int]]]:
    """Raises an error if layers have different numbers of classes, or classes of one layer different numbers of experts."""
    if len({len(layer) for layer in layers}) > 1 or not all(layer and len({len(row) for row in layer}) == 1 for layer in layers):
        raise ValueError
    return layers


def _none_is_empty(value: Any) -> Any:
    return [] if value is None else value


Loads = Annotated[
    list[list[Annotated[list[NonNegativeInt], Field(min_length=1)]]],
    AfterValidator(_rectangular),
    BeforeValidator(_none_is_empty),
    ValidValues("[L][classes][N] counts"),
]

if not TYPE_CHECKING:
    __getattr__ = getter(__name__)

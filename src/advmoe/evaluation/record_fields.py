"""The types of a Record's fields: bounded numbers, text and images. Each type describes its valid values in words.

Numbers are finite and at most 1e15 in magnitude, or whole and below 2**64, as a seed can be. True and false are not numbers.
"""

import base64
import io
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeGuard

from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    model_serializer,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from advmoe.config.schema import MAX_EXPERTS
from advmoe.errors import INTEGER_LIMIT
from advmoe.files import JsonObject

MAX_NUMBER = 1e15
MAX_PIXELS = 4_000_000


@dataclass(frozen=True)
class ValidValues:
    """The valid values of a field in words, for the error message and the JSON Schema."""

    text: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
            try:
                return validate(value)
            except (ValidationError, OverflowError):
                raise PydanticCustomError("words", "{words}", {"words": self.text}) from None

        return core_schema.no_info_wrap_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "description": self.text}


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value from JSON is a number: finite and at most MAX_NUMBER in magnitude, or whole and below INTEGER_LIMIT, as
    settings of a run are. True and false are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < INTEGER_LIMIT if isinstance(value, int) else -MAX_NUMBER <= value <= MAX_NUMBER


def plain(value: Any) -> Any:
    """A value from JSON, with tuples as lists. Raises ValueError unless it is null, a bool, text, a number or a list of these."""
    if value is None or isinstance(value, bool | str) or is_number(value):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    raise ValueError


def _png(value: str) -> str:
    """Raises an error if `value` is not the base64 of a grey or RGB PNG that can be decoded."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(value, validate=True)), formats=["PNG"]) as file:
            if file.mode not in ("L", "RGB") or file.width * file.height > MAX_PIXELS:
                raise ValueError
            file.load()
    except Exception:  # decoders raise many kinds of errors on broken bytes
        raise ValueError from None
    return value


Number = Annotated[float, Field(strict=True, ge=-MAX_NUMBER, le=MAX_NUMBER), ValidValues("a number")]
Percent = Annotated[float, Field(strict=True, ge=0, le=100), ValidValues("a number from 0 to 100")]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0, le=MAX_NUMBER), ValidValues("a number of at least 0")]
Positive = Annotated[float, Field(strict=True, gt=0, le=MAX_NUMBER), ValidValues("a number above 0")]
Scale = Annotated[float, Field(strict=True, gt=0, le=1), ValidValues("a number in (0, 1]")]
# float32 may round above 1
RecordedShare = Annotated[float, Field(strict=True, ge=0, le=1.001), ValidValues("a number from 0 to 1")]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0, le=MAX_NUMBER), ValidValues("a whole number of at least 0")]
Size = Annotated[int, Field(strict=True, ge=1, le=MAX_NUMBER), ValidValues("a whole number of at least 1")]
Seed = Annotated[int, Field(strict=True, gt=-INTEGER_LIMIT, lt=INTEGER_LIMIT), ValidValues("a whole number")]
Experts = Annotated[int, Field(strict=True, ge=1, le=MAX_EXPERTS), ValidValues(f"a whole number from 1 to {MAX_EXPERTS}")]
Text = Annotated[str, Field(strict=True), ValidValues("text")]
Png = Annotated[str, Field(strict=True), AfterValidator(_png), ValidValues("a grey or RGB PNG in base64")]
Value = Annotated[Any, AfterValidator(plain), ValidValues("null, true, false, text, a number, or a list of these")]
CountList = Annotated[list[NonNegativeInt], Field(fail_fast=True)]


class RecordModel(BaseModel):
    """A model that writes the fields named in `sparse` to JSON only if they are not None."""

    model_config = ConfigDict(extra="ignore", validate_assignment=False, protected_namespaces=())
    sparse: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> JsonObject:
        content: JsonObject = serialize(self)
        return {name: value for name, value in content.items() if value is not None or name not in self.sparse}

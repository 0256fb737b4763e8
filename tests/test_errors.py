from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from advmoe.errors import UserError, check_count, lookup, nearest, one_line, reason_of, short_repr


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: Annotated[int, Field(ge=1)] = 1
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    kind: Literal["a", "b"] = "a"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    width: int | None = None


class Tree(BaseModel):
    model_config = ConfigDict(extra="forbid")

    part: Part
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


def test_the_reason_of_an_error_is_one_short_line_and_never_empty():
    assert reason_of(ValueError("two\n  lines ")) == "two lines"
    assert reason_of(EOFError()) == "EOFError"
    assert reason_of(ValueError("x" * 300)) == "x" * 200


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "part is missing"),
        ({"part": 3}, "part must be a mapping of fields, not 3"),
        ({"part": {"count": 0}}, "part.count must be at least 1, not 0"),
        ({"part": {"count": "many"}}, "part.count must be int, not 'many'"),
        ({"part": {"share": 0}}, "part.share must be in (0, 1], not 0"),
        ({"part": {"kind": "c"}}, "part.kind must be one of a, b, not 'c'"),
        ({"part": {"seed": 2**63}}, f"part.seed must be in [0, 2**63), not {2**63}"),
        ({"part": {"width": "wide"}}, "part.width must be int or none, not 'wide'"),
        ({"part": {}, "rate": 0}, "rate must be positive and finite, not 0"),
        ({"part": {}, "rate": float("inf")}, "rate must be positive and finite, not inf"),
        ({"part": {"count": 0, "shares": 1}}, "unknown field 'part.shares': did you mean share?"),
        ({"part": {}, "x": 1}, "unknown field 'x': there is part, rate"),
    ],
)
def test_the_first_wrong_field_of_data_is_one_line(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        Tree.model_validate(tree)
    assert one_line(error.value, Tree) == message


def test_a_message_is_one_printable_line() -> None:
    assert str(UserError("a\nb\x1b[2J \udcff é")) == r"a b\x1b[2J \udcff é"


LONG = {"text": "x" * 10**6, "number": 10**10_000, "list": [[["x"] * 1000] * 1000] * 1000, "mapping": {"x" * 1000: "y" * 1000}}


@pytest.mark.parametrize("value", LONG.values(), ids=LONG)
def test_values_are_shortened(value: Any) -> None:
    assert len(short_repr(value)) <= 80


def test_unknown_names_get_similar_ones_or_all() -> None:
    assert nearest("advmo", ["at_moe", "advmoe"]) == "did you mean advmoe?"
    assert nearest("x", ["b", "a"]) == "there is a, b"
    assert lookup({"a": 1}, "a", "letter") == 1
    with pytest.raises(UserError, match="unknown letter 'x': there is a"):
        lookup({"a": 1}, "x", "letter")


# Numbers of things


def test_a_count_is_a_positive_number_of_32_bits() -> None:
    check_count("width", 1)
    check_count("width", 2**31 - 1)
    with pytest.raises(UserError, match=r"^width must be at least 1, not 0$"):
        check_count("width", 0)
    with pytest.raises(UserError, match=r"^width must be less than 2\*\*31, not 2147483648$"):
        check_count("width", 2**31)


def test_a_reason_may_start_with_the_class() -> None:
    assert reason_of(KeyError(3), named=True) == "KeyError: 3"
    assert reason_of(ValueError("a\nb"), named=True) == "ValueError: a b"
    assert len(reason_of(ValueError("x" * 1000), named=True)) == 200

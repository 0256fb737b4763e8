"""The rules of a Record's fields."""

import base64
import copy

import pytest
from json_trees import REMOVED, with_value
from records import content, old_content

from advmoe.errors import UserError
from advmoe.evaluation.record_fields import MAX_NUMBER, is_number
from advmoe.evaluation.record_file import checked_record, is_readable

RECORD = content()
NAN = float("nan")


def fault(record):
    """The reason why a Record is refused, or an empty string."""
    try:
        checked_record(record, "here")
    except UserError as error:
        return str(error).removeprefix("here: holds no Record (")
    return ""


@pytest.fixture
def garbled_parts(caplog):
    """garbled_parts(record): the parts that are left out when a Record is read."""

    def parts(record):
        caplog.clear()
        checked_record(record, "here")
        return [
            name for line in caplog.messages for name in line.removeprefix("here: read without its garbled parts: ").split(", ")
        ]

    return parts


@pytest.mark.parametrize("sound", [RECORD, content("at_dense"), old_content()], ids=["routed", "dense", "old"])
def test_sound_records_break_no_rule(sound, garbled_parts):
    assert (fault(sound), garbled_parts(sound)) == ("", [])


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf"), True, "1", None, [], 10**400, 2 * MAX_NUMBER])
def test_values_that_are_not_numbers(value):
    assert not is_number(value)


def test_the_largest_seeds_are_recorded():
    largest = 2**63 - 1
    record = with_value(with_value(RECORD, ("attack_seed",), largest), ("config", "seed"), largest)
    assert fault(record) == ""
    assert checked_record(record, "here").config.model_dump()["seed"] == largest


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("evaluation", "figures", "sa"), []),
        (("evaluation", "intervals", "sa"), [1]), (("evaluation", "intervals", "sa"), [NAN, 1]),
        (("evaluation", "checks", 0, "status"), "odd"), (("evaluation", "checks", 0), 7), (("evaluation", "routing"), {}),
        (("evaluation", "left_out"), 1.5),
        (("evaluation", "attacks"), {"X": {"a": 1}}), (("ra_aa",), {}), (("ra", "50"), 101), (("seed",), 1.5), (("gmacs",), 0),
        (("config", "model", "model_scale"), NAN), (("config", "model", "num_experts"), "x"), (("config", "model", "width"), 1.5),
        (("config", "training", "epochs"), None), (("config", "attack"), 1), (("config", "training", "lr"), {"a": {}}),
    ],
)  # fmt: skip
def test_a_bad_required_field_refuses_the_record(path, value):
    assert fault(with_value(RECORD, path, value)).startswith(f"{path[0]}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("run",), 1), (("commit",), []), (("versions",), {"a": 1}), (("hardware",), NAN), (("classes",), [1]),
        (("classes",), "abc"),
        (("layers", 0, "experts"), 0), (("layers", 0, "experts"), 10**9), (("layers", 0, "size"), [1, NAN]), (("layers", 0), {}),
        (("load_by_class",), [["a"]]), (("load_by_class", 0, 0), [1]), (("load_by_class", 0), []),
        (("load_by_class", 1), [[1, 2]]), (("load_by_class", 0, 0, 0), True), (("epsilon_curve",), NAN),
        (("epsilon_curve", "ra"), [1]), (("epsilon_curve", "ra", 0), NAN), (("history", 0, "val_ra"), "x"),
        (("history", 0, "loss"), NAN), (("history",), [[]]), (("gallery", 0), []), (("gallery", 0, "label"), -1),
        (("gallery", 0, "label"), 4), (("gallery", 0, "clean", "prediction"), 4), (("gallery", 0, "clean", "route"), [0]),
        (("gallery", 0, "clean", "route"), None), (("gallery", 0, "clean", "route", 0), 2),
        (("gallery", 0, "clean", "confidence"), 2), (("gallery", 0, "steps", 0, "prediction"), 4),
        (("gallery", 0, "steps", 0, "route"), [0]), (("gallery", 0, "steps", 0, "epsilon"), -1),
        (("gallery", 0, "steps"), 17 * RECORD["gallery"][0]["steps"][:1]),
        (("gallery", 0, "clean", "png"), "<script>"), (("gallery", 0, "clean", "png"), ""),
        (("gallery", 0, "clean", "png"), base64.b64encode(b"GIF89a").decode()),
        (("gallery", 0, "clean", "png"), RECORD["gallery"][0]["clean"]["png"][:60]),
    ],
)  # fmt: skip
def test_a_bad_optional_part_is_left_out(path, value, garbled_parts):
    garbled = with_value(RECORD, path, value)
    assert fault(garbled) == ""
    assert garbled_parts(garbled) == [path[0]]


def test_a_missing_field_counts_as_a_bad_one(garbled_parts):
    assert garbled_parts(with_value(RECORD, ("gallery", 0, "label"), REMOVED)) == ["gallery"]
    assert fault(with_value(RECORD, ("evaluation", "attacks", "pgd_50", "attacked"), REMOVED)).startswith("evaluation.attacks")


def test_one_router_may_choose_for_all_layers(garbled_parts):
    record = copy.deepcopy(RECORD)
    for image in record["gallery"]:
        for entry in (image["clean"], image["adversarial"], *image["steps"]):
            entry["route"] = [1]
    assert garbled_parts(record) == []


def test_text_that_is_no_unicode_and_deep_nesting_are_not_readable():
    nested = []
    for _ in range(1000):
        nested = [nested]
    assert not is_readable({"a": nested})
    assert not is_readable({"a": ["\udfff"]})
    assert not is_readable({"\ud800": 1})
    assert is_readable({"é": ["\U0001f600", 1, None, RECORD]})

"""What each field of a Record must hold."""

import base64
import copy
import sys
from pathlib import Path

import pytest

from advmoe.errors import UserError
from advmoe.evaluation.record_fields import LARGEST, is_number
from advmoe.evaluation.record_file import checked_record, is_readable

sys.path.append(str(Path(__file__).parents[1] / "reports"))
from records import content, old_content

WHOLE = content()
NAN = float("nan")


def with_value(place, value):
    """A sound Record with another value at a path of keys."""
    made = copy.deepcopy(WHOLE)
    own = made
    for key in place[:-1]:
        own = own[key]
    own[place[-1]] = value
    return made


def without(place):
    made = with_value(place, None)
    own = made
    for key in place[:-1]:
        own = own[key]
    del own[place[-1]]
    return made


def fault(made):
    """Why a Record is refused; empty where it is read."""
    try:
        checked_record(made, "here")
    except UserError as error:
        return str(error).removeprefix("here: holds no Record (")
    return ""


def garbled_parts(made):
    """The parts that are left out when a Record is read."""
    lines = []
    checked_record(made, "here", lines.append)
    return [name for line in lines for name in line.removeprefix("here: read without its garbled parts: ").split(", ")]


@pytest.mark.parametrize("sound", [WHOLE, content("at_dense"), old_content()], ids=["routed", "dense", "old"])
def test_sound_records_break_no_rule(sound):
    assert (fault(sound), garbled_parts(sound)) == ("", [])


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf"), True, "1", None, [], 10**400, 2 * LARGEST])
def test_what_is_no_number(value):
    assert not is_number(value)


@pytest.mark.parametrize(
    ("place", "value"),
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
def test_main_fields(place, value):
    assert fault(with_value(place, value)).startswith(f"{place[0]}")


@pytest.mark.parametrize(
    ("place", "value"),
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
        (("gallery", 0, "steps"), 17 * WHOLE["gallery"][0]["steps"][:1]),
        (("gallery", 0, "clean", "png"), "<script>"), (("gallery", 0, "clean", "png"), ""),
        (("gallery", 0, "clean", "png"), base64.b64encode(b"GIF89a").decode()),
        (("gallery", 0, "clean", "png"), WHOLE["gallery"][0]["clean"]["png"][:60]),
    ],
)  # fmt: skip
def test_parts(place, value):
    garbled = with_value(place, value)
    assert fault(garbled) == ""
    assert garbled_parts(garbled) == [place[0]]


def test_a_field_that_a_part_lacks_garbles_it():
    assert garbled_parts(without(("gallery", 0, "label"))) == ["gallery"]
    assert fault(without(("evaluation", "attacks", "pgd_50", "attacked"))).startswith("evaluation.attacks")


def test_one_router_may_choose_for_all_layers():
    made = copy.deepcopy(WHOLE)
    for image in made["gallery"]:
        for seen in (image["clean"], image["adversarial"], *image["steps"]):
            seen["route"] = [1]
    assert garbled_parts(made) == []


def test_text_that_cannot_be_written_and_what_is_nested_without_end_are_not_readable():
    deep = []
    for _ in range(1000):
        deep = [deep]
    assert not is_readable({"a": deep})
    assert not is_readable({"a": ["\udfff"]})
    assert not is_readable({"\ud800": 1})
    assert is_readable({"é": ["\U0001f600", 1, None, WHOLE]})

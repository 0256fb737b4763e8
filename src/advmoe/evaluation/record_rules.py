"""What the fields of a Record must hold, so that whoever reads one meets no surprise.

Numbers are finite, true and false are none, and what JSON calls a number beyond 1e15 is none of ours.
"""

import base64
import io
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from PIL import Image

LARGEST = 1e15
MOST_EXPERTS = 1000
DEEPEST = 12  # lists and objects in one another; the deepest of ours are 5
MOST_PIXELS = 4_000_000
STATUSES = ("pass", "warn", "fail", "skipped")
ABSENT = object()
Test = Callable[[Any], bool]


@dataclass(frozen=True)
class Rule:
    """What a field must hold, in words and as a test; one that is not `needed` may be absent."""

    words: str
    holds: Test
    needed: bool = True


def is_number(value: Any, least: float = -LARGEST, most: float = LARGEST) -> TypeGuard[int | float]:
    """Whether JSON holds a finite number there, in [least, most]; NaN compares as false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _whole(value: Any, least: float = 0, most: float = LARGEST) -> bool:
    return isinstance(value, int) and is_number(value, least, most)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _percent(value: Any) -> bool:
    return is_number(value, 0, 100)


def _positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _size(value: Any) -> bool:
    return _whole(value, 1)


def _not_negative(value: Any) -> bool:
    return is_number(value, 0)


def _all(value: Any, test: Test, least: int = 0) -> bool:
    """Whether it is a list of at least so many entries, all of which pass."""
    return isinstance(value, list | tuple) and len(value) >= least and all(test(item) for item in value)


def _each(value: Any, test: Test) -> bool:
    """Whether it is an object all of whose values pass."""
    return isinstance(value, Mapping) and all(test(item) for item in value.values())


def _has(value: Any, tests: Mapping[str, Test], optional: Mapping[str, Test] | None = None) -> bool:
    """Whether it is an object with fields that pass `tests`, and `optional` ones that pass where they are there."""
    if not isinstance(value, Mapping) or not all(name in value and test(value[name]) for name, test in tests.items()):
        return False
    return all(test(value[name]) for name, test in (optional or {}).items() if name in value)


def _plain(value: Any) -> bool:
    """A setting: null, true, false, text, a finite number, or a list of such."""
    return value is None or isinstance(value, bool | str) or is_number(value) or _all(value, _plain)


def _interval(value: Any) -> bool:
    return _all(value, _percent, 2) and len(value) == 2


def _check(value: Any) -> bool:
    return _has(value, {"number": _whole, "name": _text, "status": lambda word: word in STATUSES, "detail": _text})


def _attack(value: Any) -> bool:
    return _has(value, {"attacked": _whole, "broken": _whole, "seconds": _not_negative})


def _routing(value: Any) -> bool:
    return value is None or _has(value, dict.fromkeys(("ra_router", "ra_expert", "flip_rate"), _percent))


TEXT = Rule("text", _text)
PERCENT = Rule("a number from 0 to 100", _percent)
MAYBE_PERCENT = Rule(PERCENT.words, _percent, needed=False)
NOT_NEGATIVE = Rule("a number of at least 0", _not_negative)
POSITIVE = Rule("a number above 0", _positive)
WHOLE = Rule("a whole number of at least 0", _whole)
SIZE = Rule("a whole number of at least 1", _size)
SEED = Rule("a whole number", lambda value: _whole(value, -LARGEST))
MEASURED = ("sa", "ra_10", "ra_20", "ra_50", "ra_aa", "ra_worst", "ra_worst_quick")
RULES: dict[str, Rule] = {  # of every schema; without one of these a Record is none
    **dict.fromkeys(("method", "backbone", "dataset", "norm", "fingerprint", "time"), TEXT),
    "sa": PERCENT, "ra": Rule("an object of numbers from 0 to 100", lambda value: _each(value, _percent)),
    **dict.fromkeys(("ra_aa", "ra_worst", "ra_worst_quick"), MAYBE_PERCENT),
    **dict.fromkeys(("epsilon", "gmacs_executed", "train_seconds", "evaluate_seconds"), NOT_NEGATIVE),
    **dict.fromkeys(("gmacs", "gmacs_dense"), POSITIVE), "reduction": Rule("a number", is_number),
    **dict.fromkeys(("params", "epoch", "train_images"), WHOLE), "test_images": SIZE,
    **dict.fromkeys(("seed", "attack_seed"), SEED),
    "config": Rule("an object of settings", lambda value: _each(value, lambda own: _plain(own) or _each(own, _plain))),
    "config.model.width": Rule("null or a whole number of at least 1", lambda value: value is None or _size(value), needed=False),
    "config.model.model_scale": Rule("a number in (0, 1]", lambda value: _positive(value) and value <= 1),
    "config.model.num_experts": SIZE, "config.attack.num_steps": WHOLE, "config.attack.epsilon": NOT_NEGATIVE,
    "config.training.epochs": WHOLE,
    "evaluation": Rule("an object", lambda value: isinstance(value, Mapping)),
    "evaluation.intervals": Rule("an object of pairs of numbers from 0 to 100", lambda value: _each(value, _interval)),
    **{f"evaluation.{name}": MAYBE_PERCENT for name in MEASURED},
    "evaluation.checks": Rule("a list of checks: number, name, status, detail", lambda value: _all(value, _check)),
    "evaluation.attacks": Rule(
        "an object of attacks: attacked, broken, seconds", lambda value: value is None or _each(value, _attack), needed=False
    ),
    "evaluation.left_out": Rule(
        "an object of reasons", lambda value: value is None or _each(value, _text), needed=False
    ),
    "evaluation.routing": Rule("null or an object with ra_router, ra_expert, flip_rate", _routing, needed=False),
}  # fmt: skip


def fault(record: Mapping[str, Any]) -> str:
    """The first of RULES that a Record breaks, in words; empty where it breaks none."""
    for name, rule in RULES.items():
        value = _at(record, name)
        if value is ABSENT and rule.needed:
            return f"{name} is missing"
        if value is not ABSENT and not rule.holds(value):
            return f"{name} is {shown(value)}, not {rule.words}"
    if not {"ra_worst", "ra_worst_quick"} & set(record):
        return "ra_worst is missing"
    evaluation = record["evaluation"]
    odd = [name for name in evaluation["intervals"] if name in evaluation and not _percent(evaluation[name])]
    return f"evaluation.{odd[0]} is {shown(evaluation[odd[0]])}, not {PERCENT.words}" if odd else ""


def _at(record: Any, name: str) -> Any:
    """The field of a dotted name, or ABSENT."""
    for part in name.split("."):
        if not isinstance(record, Mapping) or part not in record:
            return ABSENT
        record = record[part]
    return record


def shown(value: Any) -> str:
    """A value from JSON in a few words of one line."""
    return reprlib.repr(value)


def is_readable(value: Any, depth: int = DEEPEST) -> bool:
    """Whether it is nested at most `depth` deep, and all of its text can be written as UTF-8 (JSON can name halves of a pair)."""
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    items: Iterable[Any] = [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return depth > 0 and all(is_readable(item, depth - 1) for item in items)


def garbled_parts(record: Mapping[str, Any]) -> list[str]:
    """Names of the parts that can be done without and are not what they should be.

    Images are held against the class names and layers, where these are sound.
    """
    garbled = [name for name, holds in PARTS.items() if name in record and not holds(record[name])]
    sound = {name: record.get(name) or [] for name in ("classes", "layers") if name not in garbled}
    images = [] if "gallery" in garbled else record.get("gallery") or []
    if not all(_fits(image, sound.get("classes", []), sound.get("layers", [])) for image in images):
        garbled.append("gallery")
    return garbled


def _layers(value: Any) -> bool:
    tests = {
        "name": _text, "in_channels": _size, "width": _size, "size": lambda own: _all(own, _size, 2),
        "experts": lambda own: _whole(own, 1, MOST_EXPERTS),
    }  # fmt: skip
    return _all(value, lambda layer: _has(layer, tests))


def _loads(value: Any) -> bool:
    """[L][classes][N] counts, the same classes in all layers; or null."""
    if value is None or not _all(value, lambda layer: _all(layer, lambda row: _all(row, _whole, 1), 1)):
        return value is None
    return len({len(layer) for layer in value}) <= 1 and all(len({len(row) for row in layer}) == 1 for layer in value)


def _curve(value: Any) -> bool:
    tests = {
        "attack": _text, "images": _size,
        "epsilons": lambda own: _all(own, _not_negative, 1), "ra": lambda own: _all(own, _percent),
    }  # fmt: skip
    return value is None or (_has(value, tests) and len(value["epsilons"]) == len(value["ra"]))


def _history(value: Any) -> bool:
    tests = {"epoch": _whole, "phase": _whole, "val_sa": _percent, "val_ra": _percent}
    return _all(value, lambda row: _has(row, tests, {"loss": is_number, "router_loss": is_number, "lr": is_number}))


def _gallery(value: Any) -> bool:
    """Each image's two routes are of one length, also where there is none."""
    tests = {"row": _whole, "label": _whole, "attack": _text, "clean": _seen, "adversarial": _seen}
    return _all(value, lambda own: _has(own, tests) and len({len(route) for route in _routes(own)}) == 1)


def _seen(value: Any) -> bool:
    tests: dict[str, Test] = {
        "png": _png, "prediction": _whole, "confidence": lambda own: is_number(own, 0, 1.001),  # float32 may exceed 1 by a hair
        "route": lambda own: own is None or _all(own, _whole),
    }  # fmt: skip
    return _has(value, tests)


def _routes(image: Mapping[str, Any]) -> list[Any]:
    return [image[side]["route"] or [] for side in ("clean", "adversarial")]


def _fits(image: Mapping[str, Any], classes: list[str], layers: list[Mapping[str, Any]]) -> bool:
    """Whether classes and experts are there of which an image speaks; no class names, or no layers, allow any."""
    labels = (image["label"], image["clean"]["prediction"], image["adversarial"]["prediction"])
    if classes and max(labels) >= len(classes):
        return False
    if not layers:
        return True
    experts = [layer["experts"] for layer in layers]
    return all(_route_fits(route, experts) for route in _routes(image))


def _route_fits(route: list[int], experts: list[int]) -> bool:
    """One router may choose for all layers."""
    choices = route * len(experts) if len(route) == 1 else route
    return not route or (len(choices) == len(experts) and all(own < most for own, most in zip(choices, experts, strict=True)))


def _png(value: Any) -> bool:
    """Whether it is the base64 of a grey or RGB PNG that can be decoded."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(value, validate=True)), formats=["PNG"]) as file:
            if file.mode not in ("L", "RGB") or file.width * file.height > MOST_PIXELS:
                return False
            file.load()
    except Exception:  # what a decoder raises on broken bytes is of many kinds and says nothing else
        return False
    return True


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


PARTS: dict[str, Test] = {  # what a report can do without
    "run": _or_none(_text), "advmoe": _or_none(_text), "commit": _or_none(_text),
    "versions": _or_none(lambda value: _each(value, _text)), "hardware": _or_none(lambda value: _each(value, _plain)),
    "history": _history, "classes": lambda value: _all(value, _text), "layers": _layers, "load_by_class": _loads,
    "epsilon_curve": _curve, "gallery": _gallery,
}  # fmt: skip

"""Public names of earlier versions. Using one raises an error that gives its present name."""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

MOVED = {  # module -> former name -> present name
    "advmoe": {
        "allocator": "advmoe.libraries",
        "artifact": "advmoe.runs.load",
        "commands": "advmoe.cli",
        "predict": "advmoe.runs.predict",
        "profile": "advmoe.runs.cost",
        "ranks": "advmoe.distributed",
    },
    "advmoe.attacks": {"PictureDraws": "advmoe.attacks.ImageDraws"},
    "advmoe.data": {"PictureSpec": "advmoe.data.ImageSpec", "Pictures": "advmoe.data.Images"},
    "advmoe.data.images": {"divided": "advmoe.data.images.make_splits"},
    "advmoe.evaluation": {"CheckResult": "advmoe.evaluation.Check", "evaluate_with": "advmoe.evaluation.evaluate"},
    "advmoe.evaluation.record": {
        "AttackTotals": "advmoe.evaluation.record_evaluation.AttackTotals",
        "checked_record": "advmoe.evaluation.record_file.checked_record",
        "evaluate_run": "advmoe.evaluation.make_record.evaluate_run",
        "make_record": "advmoe.evaluation.make_record.make_record",
        "model_info": "advmoe.evaluation.robustbench.model_info",
        "read_record": "advmoe.evaluation.record_file.read_record",
    },
    "advmoe.evaluation.record_snapshot": {"Seen": "advmoe.evaluation.record_snapshot.View"},
    "advmoe.export": {"Answers": "advmoe.export.Outputs", "answers": "advmoe.export.outputs"},
    "advmoe.moe": {"Dispatch": "advmoe.config.choices.Dispatch", "GateKind": "advmoe.moe.GATES", "pictures": "advmoe.moe.images"},
    "advmoe.runs.loaded": {"Answer": "advmoe.runs.loaded.Prediction"},
}


def getter(module: str, lazy: Mapping[str, str] = MappingProxyType({})) -> Callable[[str], Any]:
    """`__getattr__` of a module (PEP 562). A name in `lazy` is imported when it is first used, from the module that `lazy` gives.

    It raises ImportError for a name in MOVED, and AttributeError for any other.
    """

    def get(name: str) -> Any:
        if name in lazy:
            return getattr(import_module(lazy[name]), name)
        if name in MOVED[module]:
            raise ImportError(f"{module}.{name} is now {MOVED[module][name]}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return get

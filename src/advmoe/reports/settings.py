"""The settings of runs: which must be equal, and in what runs differ."""

from collections.abc import Mapping
from typing import Any

from advmoe.config import OF_MACHINE, flat_settings
from advmoe.evaluation.record import Record
from advmoe.reports.cell import (
    DEFAULTS,
    INGREDIENTS,
    OF_CHOICE,
    OF_METHODS,
    OF_ROUTERS,
    OF_VARIANTS,
    is_full_scale,
    is_routed,
    short_value,
)
from advmoe.reports.measures import ATTACK_DEFAULTS, PRESENT, attack_settings, evaluated
from advmoe.training.methods import METHODS

# settings that do not change a run's result, or that its cell already holds
NOT_COMPARED = (*OF_MACHINE, "schema", "method", "seed", "data.limit_train", "data.limit_test")
IN_CELL = (  # settings that a cell already holds, with the precision and the data's fingerprint
    *(f"model.{name}" for name in ("backbone", "width", "model_scale", "num_experts")),
    "data.dataset", "attack.num_steps", "training.epochs", "runtime.precision", "fingerprint",
)  # fmt: skip


def settings(record: Record) -> dict[str, object]:
    """All settings that can change a run's result, except its seed: 'section.field' -> value, of the fields that its method uses,
    with the data's fingerprint, the settings and versions of the attacks, and the epochs trained. A field that the Record is too
    old to have gets its default."""
    method = record.method
    ignored = {
        *NOT_COMPARED,
        *(() if is_routed(method) else OF_ROUTERS),
        *(OF_CHOICE if record.config.model.num_experts == 1 else ()),
        *(("model.model_scale",) if is_full_scale(method) else ()),
    }
    flat = DEFAULTS | flat_settings(record.config.model_dump()) | {"fingerprint": record.fingerprint}
    flat |= attack_settings(record) | {"evaluated": evaluated(record), "epochs trained": epochs_trained(record)}
    return {name: value for name, value in flat.items() if name not in ignored}


def epochs_trained(record: Record) -> str:
    """'all', or '3 of 6' for a run that was evaluated before its end."""
    phases = len(METHODS[record.method].phases) if record.method in METHODS else 1
    trained, epochs = len(record.history), phases * record.config.training.epochs
    return f"{trained} of {epochs}" if 0 < trained < epochs else "all"


def shared_settings(record: Record) -> dict[str, object]:
    """The `settings` that must be equal to compare runs of different methods: all but those of routers, experts and methods, and
    the ingredients, which belong to the network's name."""
    return {name: value for name, value in settings(record).items() if name not in (*OF_METHODS, *INGREDIENTS)}


def departures(record: Record) -> tuple[str, ...]:
    """'training.lr 0.05 (0.1)': settings that are no field of the cell and differ from the default, which is given in brackets."""
    defaults = DEFAULTS | ATTACK_DEFAULTS | {"evaluated": PRESENT, "epochs trained": "all"}
    as_trained = ("attack.epsilon",) if record.config.attack.epsilon == record.epsilon else ()
    in_cell = (*IN_CELL, *OF_VARIANTS, *OF_CHOICE, *INGREDIENTS)
    others = {name: value for name, value in settings(record).items() if name not in (*in_cell, *as_trained)}
    return tuple(
        f"{name} {short_value(value)} ({short_value(defaults.get(name))})"
        for name, value in others.items()
        if value != defaults.get(name)
    )


def differing(values: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """'training.lr: 0.05, not 0.1': the settings that differ from the expected ones; empty if none does."""
    names = [name for name in {**values, **expected} if values.get(name) != expected.get(name)]
    texts = [f"{name}: {short_value(values.get(name))}, not {short_value(expected.get(name))}" for name in names]
    if "evaluated" in names:  # neither version is the wrong one
        texts[names.index("evaluated")] = f"evaluated {values['evaluated']}, the other {expected['evaluated']}"
    return "; ".join(texts)

"""How long the epochs and evaluations of a sweep's earlier runs really took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from advmoe.attacks.presets import resolve
from advmoe.config import RunConfig, RuntimeConfig
from advmoe.runs.status import RunState, number, read_run

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Past:
    """Mean seconds: of an epoch with its look at the held-out part, by the number of its phase (from 0), and of an evaluation,
    None where no run tells."""

    epochs: Mapping[int, float] = field(default_factory=dict)
    evaluation: float | None = None


def alike(config: RunConfig) -> RunConfig:
    """What runs have in common that differ in their seed alone, in how many epochs they have, or in where their data lies."""
    data = replace(config.data, data_dir=None, workers=None)
    runtime = RuntimeConfig(precision=config.runtime.precision, threads=config.runtime.threads)
    return replace(config, seed=0, data=data, training=replace(config.training, epochs=1), runtime=runtime)


def past(folders: Sequence[Path], preset: str | Sequence[str]) -> dict[RunConfig, Past]:
    """What the runs in `folders` tell, by `alike` of their configurations. Evaluations are those by the attacks of `preset`."""
    groups: dict[RunConfig, list[RunState]] = {}
    for state in map(read_run, folders):
        if state.config is not None:
            groups.setdefault(alike(state.config), []).append(state)
    attacks = frozenset(resolve(preset).attacks)
    return {key: Past(_epochs(states), _evaluation(states, attacks)) for key, states in groups.items()}


def _epochs(states: Sequence[RunState]) -> dict[int, float]:
    phases: dict[int, list[float]] = {}
    for state in states:
        for row in state.rows:
            seconds = number(row, "train_seconds") + number(row, "validate_seconds")
            if state.config is not None and seconds > 0:
                phases.setdefault((row["epoch"] - 1) // state.config.training.epochs, []).append(seconds)
    return {phase: mean(seconds) for phase, seconds in phases.items()}


def _evaluation(states: Sequence[RunState], attacks: frozenset[str]) -> float | None:
    known = [_evaluate_seconds(state.record, attacks) for state in states if state.record is not None]
    seconds = [found for found in known if found > 0]
    return mean(seconds) if seconds else None


def _evaluate_seconds(record: Mapping[str, Any], attacks: frozenset[str]) -> float:
    """Of an evaluation by these attacks; 0 where it is none. One that was stopped counts its last part alone, but all attacks."""
    evaluation = record.get("evaluation")
    try:
        run, left_out = evaluation["attacks"], evaluation["left_out"]  # type: ignore[index]  # caught where it is no mapping
        if {*run, *left_out} != attacks:
            return 0.0
        return max(number(record, "evaluate_seconds"), sum(number(attack, "seconds") for attack in run.values()))
    except (TypeError, KeyError, AttributeError):
        return 0.0

"""The runs of a sweep, each with its name and its configuration."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from advmoe.config import RunConfig, differences
from advmoe.data import DATASETS
from advmoe.errors import UserError, lookup
from advmoe.recipes import method_traits, recipe
from advmoe.sweep.grid import MAX_RUNS, Grid, Settings, SweepFile, decimal, with_settings

NUMBERED = re.compile(r"[nrs][\d.]+")  # number of experts, model scale or seed, in a name
NUMBERS = ("model.num_experts", "attack.num_steps")  # what a suffix with a number sets


@dataclass(frozen=True)
class Planned:
    """One run: `name` is the name of its folder; --only searches `label`."""

    name: str
    config: RunConfig

    @property
    def label(self) -> str:
        """The name, and the model scale, which is not in the name if it is the default."""
        scaled = method_traits(self.config.method).scaled
        return f"{self.name} r{decimal(self.config.model.model_scale)}" if scaled else self.name


def plan(
    sweep: SweepFile,
    only: Sequence[str] = (),
    dataset: str | None = None,
    settings: Settings | None = None,
    seeds: int | None = None,
) -> list[Planned]:
    """The runs of a sweep, ordered by seed, so that every cell has a first run early. A run that two grids contain is planned once.

    `only` selects the runs whose label contains all of these texts (a number of experts, scale or seed, such as s1, as a whole
    part: not s10). `dataset`, `settings` and the number of `seeds` replace those of the sweep. Raises UserError if no run remains,
    if settings are not allowed, if two recipes are the same run, and for more than MAX_RUNS runs.
    """
    by_name: dict[str, Planned] = {}
    numbers = range(seeds) if seeds is not None else dict.fromkeys(seed for grid in sweep.grids for seed in grid.seeds)
    cells = [(grid, name, config) for grid in sweep.grids for name, config in _cells(grid, dataset)]
    _check_distinct((name, config) for grid, name, config in cells if not grid.variants)
    cells = [(grid, name, with_settings(config, settings or {}, "command line")) for grid, name, config in cells]
    count = sum(len(grid.seeds) if seeds is None else seeds for grid, _, _ in cells)
    if count > MAX_RUNS:
        raise UserError(f"plans {count} runs, at most {MAX_RUNS} are allowed; give fewer seeds")
    for seed in numbers:
        for grid, name, config in cells:
            if seeds is None and seed not in grid.seeds:
                continue
            run = Planned(f"{name}-s{seed}", config.replace(seed=seed))
            if by_name.setdefault(run.name, run) != run:
                raise UserError(f"two runs with different settings have the name {run.name}; give them names by variants")
    runs = list(by_name.values())
    selected = [run for run in runs if all(_contains(run.label, text) for text in only)]
    if not selected:
        missing = next((text for text in only if not any(_contains(run.label, text) for run in runs)), " ".join(only))
        raise UserError(f"--only {missing}: no run has this in its name; the first of {len(runs)} is '{runs[0].label}'")
    return selected


def _contains(label: str, text: str) -> bool:
    return text in (re.split("[- ]", label) if NUMBERED.fullmatch(text) else label)


def _check_distinct(cells: Iterable[tuple[str, RunConfig]]) -> None:
    """Raises UserError if two recipes are the same run, as a name with and without the suffix for a default is."""
    names: dict[RunConfig, str] = {}
    for name, config in cells:
        if (known := names.setdefault(config, name)) != name:
            raise UserError(f"{known} and {name} are the same run")


def _cells(grid: Grid, dataset: str | None) -> list[tuple[str, RunConfig]]:
    """The name and the configuration of every recipe and variant; the seed is set later."""
    cells = []
    for name in dict.fromkeys(_with_dataset(name, dataset) for name in grid.names()):
        config = with_settings(recipe(name), grid.settings, "settings")
        _check_suffixes(name, config, "settings")
        for variant, values in grid.variants.items() or [("", {})]:
            varied = with_settings(config, values, f"variants: {variant}")
            _check_suffixes(name, varied, f"variants: {variant}", NUMBERS)
            cells.append((f"{name}-{variant}" if variant else name, varied))
    return cells


def _check_suffixes(name: str, config: RunConfig, where: str, fields: Sequence[str] = ()) -> None:
    """Raises UserError if settings contradict the suffixes of a recipe's name, which is part of the run's name. Variants, whose
    names are part of it too, are only compared in `fields`."""
    named = recipe(name)
    plain = recipe(f"{name.rpartition(f'-{named.method}')[0]}-{named.method}")
    suffixed = {line.partition(":")[0] for line in differences(named, plain)}
    for line in differences(named, config):
        field = line.partition(":")[0]
        if field in suffixed and field in (fields or suffixed):
            raise UserError(f"{where}: the recipe {name} has {line}; name another recipe")


def _with_dataset(name: str, dataset: str | None) -> str:
    """The recipe's name with another data set."""
    if dataset is None:
        return name
    lookup(DATASETS, dataset, "dataset")
    current = max((known for known in DATASETS if name.startswith(f"{known}-")), key=len, default=None)
    if current is None:
        raise UserError(f"--dataset: the recipe {name} has a data set that cannot be replaced")
    return f"{dataset}-{name.removeprefix(f'{current}-')}"

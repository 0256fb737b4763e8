"""The runs of a sweep, each with its name and its configuration."""

from collections.abc import Sequence
from dataclasses import dataclass

from advmoe.config import RunConfig
from advmoe.data import DATASETS
from advmoe.errors import UserError, lookup
from advmoe.recipes import method_traits, recipe
from advmoe.sweep.grid import Grid, Settings, SweepFile, decimal, with_settings


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

    `only` selects the runs whose label contains all of these texts; `dataset`, `settings` and the number of `seeds` replace
    those of the sweep. Raises UserError if no run remains, or if settings are not allowed.
    """
    by_name: dict[str, Planned] = {}
    numbers = range(seeds) if seeds is not None else dict.fromkeys(seed for grid in sweep.grids for seed in grid.seeds)
    cells = [(grid, name, config) for grid in sweep.grids for name, config in _cells(grid, dataset, settings or {})]
    for seed in numbers:
        for grid, name, config in cells:
            if seeds is None and seed not in grid.seeds:
                continue
            run = Planned(f"{name}-s{seed}", config.replace(seed=seed))
            if by_name.setdefault(run.name, run) != run:
                raise UserError(f"two runs with different settings have the name {run.name}; give them names by variants")
    runs = list(by_name.values())
    selected = [run for run in runs if all(text in run.label for text in only)]
    if not selected:
        missing = next((text for text in only if not any(text in run.label for run in runs)), " ".join(only))
        raise UserError(f"--only {missing}: no run has this in its name; the first of {len(runs)} is '{runs[0].label}'")
    return selected


def _cells(grid: Grid, dataset: str | None, settings: Settings) -> list[tuple[str, RunConfig]]:
    """The name and the configuration of every recipe and variant; the seed is set later."""
    cells = []
    for name in dict.fromkeys(_with_dataset(name, dataset) for name in grid.names()):
        config = with_settings(recipe(name), grid.settings, "settings")
        for variant, values in grid.variants.items() or [("", {})]:
            varied = with_settings(config, values, f"variants: {variant}")
            cells.append((f"{name}-{variant}" if variant else name, with_settings(varied, settings, "command line")))
    return cells


def _with_dataset(name: str, dataset: str | None) -> str:
    """The recipe's name with another data set."""
    if dataset is None:
        return name
    lookup(DATASETS, dataset, "dataset")
    current = max((known for known in DATASETS if name.startswith(f"{known}-")), key=len, default=None)
    if current is None:
        raise UserError(f"--dataset: the recipe {name} has a data set that cannot be replaced")
    return f"{dataset}-{name.removeprefix(f'{current}-')}"

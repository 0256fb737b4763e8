"""What a sweep runs: a grid of the paper's, or one from a YAML file, as a list of runs.

methods: [at_dense, advmoe]        all five by default
backbones: [resnet18]
datasets: [fashion-mnist]          cifar10 by default
model_scales: [0.2, 0.5]           0.5 by default; a method without a scale is run once
seeds: 3                           or a list, of at most 1000
settings: {training: {epochs: 10}} any other field of a configuration
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from advmoe.config import ModelConfig, RunConfig, from_dict, named, read_mapping, shown, to_dict
from advmoe.errors import UserError, lookup, nearest
from advmoe.models import MODELS
from advmoe.paper import cells
from advmoe.recipes import BASES, recipe
from advmoe.training.methods import METHODS

Settings = Mapping[str, Mapping[str, Any]]  # section -> field -> value
FIVE = ("at_dense", "at_small_dense", "at_sparse", "at_moe", "advmoe")
SEEDS = (0, 1, 2)
MOST_SEEDS = 1000  # a slip of the finger beyond
MOST_RUNS = 10_000
AXES = {  # what has a place of its own in a sweep, and may not stand among its settings
    "method": "methods", "seed": "seeds", "model.backbone": "backbones", "model.model_scale": "model_scales",
    "data.dataset": "datasets", "runtime": "--device, --threads, --precision and --dispatch",
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Names of recipes, each run once a seed, all of them with the same `settings`."""

    recipes: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """One run: `name` is that of its folder; `label` is what --only looks at."""

    name: str
    config: RunConfig

    @property
    def label(self) -> str:
        """The name, and the model scale, which the name leaves out where it is the usual one."""
        return f"{self.name} r{decimal(self.config.model.model_scale)}" if scaled(self.config.method) else self.name


def decimal(scale: float) -> str:
    """The shortest decimal number that is read as `scale` again, without an exponent: "0.2", "1"."""
    return np.format_float_positional(float(scale), trim="-")


def scaled(method: str) -> bool:
    """Whether the method's network depends on the model scale."""
    kind = lookup(METHODS, method, "method").kind
    return kind(ModelConfig(model_scale=0.25)) != kind(ModelConfig(model_scale=0.5))


def _table(name: str) -> Callable[[], Grid]:
    return lambda: Grid(tuple(dict.fromkeys(cell.recipe for cell in cells() if cell.table == name)))


GRIDS: dict[str, Callable[[], Grid]] = {
    "a1": _table("A1"),
    "a2": _table("A2"),
    "fig7": _table("A2"),  # appendix: "the statistics in this table are associated with the plots in Fig. 7"
    "figA2": lambda: Grid(tuple(f"cifar10-resnet18-{method}" for method in FIVE)),
}


def grid(what: str) -> Grid:
    """A grid of the paper's by its name, or the one in a YAML file. Raises UserError where it is neither."""
    if what.endswith((".yaml", ".yml")):
        return _from_file(Path(what))
    if what not in GRIDS:
        raise UserError(f"unknown sweep '{what}', neither FILE.yaml nor one of the paper's: {nearest(what, list(GRIDS))}")
    return GRIDS[what]()


def plan(grid: Grid, only: Sequence[str] = (), dataset: str | None = None, settings: Settings | None = None) -> list[Planned]:
    """The runs of a grid, seed by seed, so that every cell has a first run early.

    `only` keeps the runs whose label holds every one of these texts, `dataset` takes the place of the grid's, `settings`
    come over the grid's own. Raises UserError where nothing is left, and on settings that a configuration refuses.
    """
    names = list(dict.fromkeys(_on(name, dataset) for name in grid.recipes))
    configs = {name: _set(_set(recipe(name), grid.settings, "settings"), settings or {}, "command line") for name in names}
    runs = [Planned(f"{name}-s{seed}", replace(configs[name], seed=seed)) for seed in grid.seeds for name in names]
    kept = [run for run in runs if all(text in run.label for text in only)]
    if not kept:
        missing = next((text for text in only if not any(text in run.label for run in runs)), " ".join(only))
        raise UserError(f"--only {missing}: no run has that in its name; the first of {len(runs)} is '{runs[0].label}'")
    return kept


def _on(name: str, dataset: str | None) -> str:
    """The recipe's name with another data set."""
    if dataset is None:
        return name
    lookup(BASES, dataset, "dataset")
    own = max((known for known in BASES if name.startswith(f"{known}-")), key=len)
    return f"{dataset}-{name.removeprefix(f'{own}-')}"


def _set(config: RunConfig, settings: Settings, where: str) -> RunConfig:
    tree = to_dict(config)
    for section, values in settings.items():
        if not isinstance(values, Mapping) or not isinstance(tree.get(section, {}), Mapping):
            raise UserError(f"{where}: {section} must be a section with fields, not {shown(values)}")
        tree[section] = {**tree.get(section, {}), **values}
    return from_dict(tree, where)


def _from_file(path: Path) -> Grid:
    tree = read_mapping(path)
    known = ["methods", "backbones", "datasets", "model_scales", "seeds", "settings"]
    for name in tree:
        if name not in known:
            raise UserError(f"{path}: unknown field {named(name)!r}: {nearest(named(name), known)}")
    methods = _names(tree, "methods", list(FIVE), METHODS, path)
    backbones = _names(tree, "backbones", ["resnet18"], MODELS, path)
    datasets = _names(tree, "datasets", ["cifar10"], BASES, path)
    scales = _scales(tree.get("model_scales", [0.5]), path)
    seeds = _seeds(tree.get("seeds", len(SEEDS)), path)
    runs = len(methods) * len(backbones) * len(datasets) * len(scales) * len(seeds)
    if runs > MOST_RUNS:
        raise UserError(f"{path}: plans {runs} runs, at most {MOST_RUNS} are; some lists are too long")
    names = [f"{d}-{b}-{m}{s}" for d in datasets for b in backbones for m in methods for s in (scales if scaled(m) else [""])]
    found = Grid(tuple(dict.fromkeys(names)), seeds, tree.get("settings") or {})
    _check_settings(found.settings, path)
    _set(RunConfig(), found.settings, f"{path}: settings")
    return found


def _names(tree: Mapping[str, Any], field: str, default: list[str], table: Collection[str], path: Path) -> list[str]:
    names = tree.get(field, default)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: {field} must be a list of names, not {shown(names)}")
    for name in names:
        if name not in table:
            raise UserError(f"{path}: {field} has no '{named(name)}': {nearest(named(name), list(table))}")
    return list(dict.fromkeys(names))


def _scales(scales: Any, path: Path) -> list[str]:
    """Model scales as suffixes of a recipe's name; the usual one has none."""
    right = isinstance(scales, list) and scales and all(type(scale) in (int, float) and 0 < scale <= 1 for scale in scales)
    if not right:
        raise UserError(f"{path}: model_scales must be a list of numbers in (0, 1], not {shown(scales)}")
    return ["" if scale == ModelConfig().model_scale else f"-r{decimal(scale)}" for scale in dict.fromkeys(scales)]


def _seeds(seeds: Any, path: Path) -> tuple[int, ...]:
    if type(seeds) is int and 1 <= seeds <= MOST_SEEDS:
        return tuple(range(seeds))
    if isinstance(seeds, list) and 1 <= len(seeds) <= MOST_SEEDS:
        wrong = [seed for seed in seeds if type(seed) is not int or not 0 <= seed < 2**63]
        if wrong:
            raise UserError(f"{path}: a seed must be a whole number in [0, 2**63), not {shown(wrong[0])}")
        return tuple(dict.fromkeys(seeds))
    wanted = f"a number of seeds from 1 to {MOST_SEEDS}, or a list of so many"
    raise UserError(f"{path}: seeds must be {wanted}, not {shown(seeds)}")


def _check_settings(settings: Any, path: Path) -> None:
    if not isinstance(settings, Mapping):
        raise UserError(f"{path}: settings must be a mapping of sections, not {shown(settings)}")
    sections = [name for name, value in to_dict(RunConfig()).items() if isinstance(value, dict) and name not in AXES]
    for section, values in settings.items():
        if section not in (*sections, *AXES):
            raise UserError(f"{path}: settings: unknown field {named(section)!r}: {nearest(named(section), sections)}")
        for name in (section, *(named(own, f"{section}.") for own in values)) if isinstance(values, Mapping) else (section,):
            if name in AXES:
                raise UserError(f"{path}: settings: {name} is not set here but by {AXES[name]}")

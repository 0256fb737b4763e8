"""The runs of a sweep: those of a table or figure of the paper, or of a sweep file in YAML.

A sweep file is one grid, or a list of grids under `grids`. All fields are optional:

    methods: [at_dense, advmoe]        default: the paper's five
    backbones: [resnet18]
    datasets: [fashion-mnist]          default: cifar10
    model_scales: [0.2, 0.5]           default: 0.5; a method without a scale is run once
    num_experts: [1, 2, 4]             default: 2; a method without experts is run once
    recipes: [cifar10-vgg16_bn-advmoe] names of recipes, instead of the five fields above
    variants:                          every run once with each of these settings; the name becomes part of the run's name
      shared: {model: {norms: shared}}
      per_expert: {model: {norms: per_expert}}
    seeds: 3                           a number of seeds from 0, or a list; at most 1000
    settings: {training: {epochs: 10}} any other field of a configuration, for all runs
    preset: [quick]                    for all grids: the attacks of the evaluations, unless --preset is given
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from advmoe import migrations
from advmoe.config import ModelConfig, RunConfig, from_dict, read_mapping, to_dict
from advmoe.config.choices import MAX_SEEDS
from advmoe.config.schema import MAX_EXPERTS
from advmoe.data import DATASETS
from advmoe.errors import UserError, nearest, one_line, short_name, short_repr
from advmoe.models import MODELS
from advmoe.paper import PAPER_METHODS, printed_cells
from advmoe.recipes import method_traits, recipe
from advmoe.training.methods import METHODS

Model = TypeVar("Model", bound=BaseModel)
Settings = Mapping[str, Mapping[str, Any]]  # section -> field -> value
SEEDS = (0, 1, 2)
PRESET = ("quick",)
MAX_RUNS = 10_000
VARIANT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
SET_ELSEWHERE = {  # fields that a sweep sets elsewhere, so that its settings must not set them
    "method": "methods", "seed": "seeds", "model.backbone": "backbones", "model.model_scale": "model_scales",
    "data.dataset": "datasets", "runtime": "--device, --threads, --precision and --dispatch",
}  # fmt: skip


def decimal(scale: float) -> str:
    """The shortest decimal number that is read as `scale` again, without an exponent: "0.2", "1"."""
    return np.format_float_positional(float(scale), trim="-")


def with_settings(config: RunConfig, settings: Settings, where: str) -> RunConfig:
    """The configuration with other values in some fields. Raises UserError, which starts with `where`."""
    tree = to_dict(config)
    for section, values in settings.items():
        if not isinstance(values, Mapping) or not isinstance(tree.get(section, {}), Mapping):
            raise UserError(f"{where}: {section} must be a section with fields, not {short_repr(values)}")
        tree[section] = {**tree.get(section, {}), **values}
    return from_dict(tree, where)


# Fields of a grid


def _list_of(items: Any, what: str, is_valid: Callable[[Any], bool]) -> tuple[Any, ...]:
    """The items, each once. Raises ValueError unless they are a list of at least one item, and all are valid."""
    if not isinstance(items, list | tuple) or not items or not all(map(is_valid, items)):
        raise ValueError(f"must be a list of {what}, not {short_repr(items)}")
    return tuple(dict.fromkeys(items))


def _names(table: Collection[str]) -> Any:
    """A validator of a list of names, all of which are in `table`. Repeated names count once."""

    def check(names: Any) -> tuple[str, ...]:
        listed = _list_of(names, "names", lambda name: isinstance(name, str))
        for name in listed:
            if name not in table:
                raise ValueError(f"unknown name '{short_name(name)}': {nearest(short_name(name), list(table))}")
        return listed

    return BeforeValidator(check)


def _recipes(names: Any) -> tuple[str, ...]:
    listed = _list_of(names, "names", lambda name: isinstance(name, str))
    for name in listed:
        recipe(name)
    return listed


def _scales(scales: Any) -> tuple[float, ...]:
    return _list_of(scales, "numbers in (0, 1]", lambda scale: type(scale) in (int, float) and 0 < scale <= 1)


def _counts(counts: Any) -> tuple[int, ...]:
    what = f"whole numbers from 1 to {MAX_EXPERTS}"
    return _list_of(counts, what, lambda count: type(count) is int and 1 <= count <= MAX_EXPERTS)


def _seeds(seeds: Any) -> tuple[int, ...]:
    if type(seeds) is int and 1 <= seeds <= MAX_SEEDS:
        return tuple(range(seeds))
    if isinstance(seeds, list | tuple) and 1 <= len(seeds) <= MAX_SEEDS:
        invalid = [seed for seed in seeds if type(seed) is not int or not 0 <= seed < 2**63]
        if invalid:
            raise ValueError(f"must be whole numbers in [0, 2**63), not {short_repr(invalid[0])}")
        return tuple(dict.fromkeys(seeds))
    raise ValueError(f"must be a number of seeds from 1 to {MAX_SEEDS}, or a list of so many, not {short_repr(seeds)}")


def _settings(settings: Any, where: str = "settings") -> Settings:
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"must be a mapping of sections, not {short_repr(settings)}")
    renamed: Settings = migrations.renamed(settings)
    sections = [name for name, value in to_dict(RunConfig()).items() if isinstance(value, dict) and name not in SET_ELSEWHERE]
    for section, values in renamed.items():
        if section not in (*sections, *SET_ELSEWHERE):
            raise ValueError(f"unknown field {short_name(section)!r}: {nearest(short_name(section), sections)}")
        for name in (
            (section, *(short_name(field, f"{section}.") for field in values)) if isinstance(values, Mapping) else (section,)
        ):
            if name in SET_ELSEWHERE:
                raise ValueError(f"{name} is set by {SET_ELSEWHERE[name]}, not here")
    with_settings(RunConfig(), renamed, where)
    return renamed


def _variants(variants: Any) -> dict[str, Settings]:
    if not isinstance(variants, Mapping):
        raise ValueError(f"must be a mapping of names to settings, not {short_repr(variants)}")
    for name in variants:
        if not isinstance(name, str) or not VARIANT.fullmatch(name):
            raise ValueError(f"{short_name(name)!r} is not a name of letters, digits, '_', '.' and '-'")
    return {name: _settings(settings, f"variants: {name}") for name, settings in variants.items()}


class Grid(BaseModel):
    """All combinations of the lists and seeds. The docstring of this module describes the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    methods: Annotated[tuple[str, ...], _names(METHODS)] = PAPER_METHODS
    backbones: Annotated[tuple[str, ...], _names(MODELS)] = ("resnet18",)
    datasets: Annotated[tuple[str, ...], _names(DATASETS)] = ("cifar10",)
    model_scales: Annotated[tuple[float, ...], BeforeValidator(_scales)] = (0.5,)
    num_experts: Annotated[tuple[int, ...], BeforeValidator(_counts)] = (2,)
    recipes: Annotated[tuple[str, ...], BeforeValidator(_recipes)] = ()
    variants: Annotated[Mapping[str, Settings], BeforeValidator(_variants)] = Field(default_factory=dict)
    seeds: Annotated[tuple[int, ...], BeforeValidator(_seeds)] = SEEDS
    settings: Annotated[Settings, BeforeValidator(_settings)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_together(self) -> "Grid":
        lists = {"methods", "backbones", "datasets", "model_scales", "num_experts"} & self.model_fields_set
        if self.recipes and lists:
            raise ValueError(f"recipes excludes {', '.join(sorted(lists))}")
        where = {"settings": self.settings} | {f"variants: {name}": values for name, values in self.variants.items()}
        twice = [name for name, settings in where.items() if "num_experts" in settings.get("model", {})]
        if "num_experts" in self.model_fields_set and twice:
            raise ValueError(f"{twice[0]}: model.num_experts is set by num_experts, not here")
        if self.size > MAX_RUNS:
            raise ValueError(f"plans {self.size} runs, at most {MAX_RUNS} are allowed; some lists are too long")
        return self

    @property
    def size(self) -> int:
        """An upper bound on the number of runs."""
        lists = (self.methods, self.backbones, self.datasets, self.model_scales, self.num_experts)
        cells = len(self.recipes) or int(np.prod([len(item) for item in lists], dtype=object))
        return cells * len(self.seeds) * max(len(self.variants), 1)

    def names(self) -> list[str]:
        """The recipes, each once."""
        if self.recipes:
            return list(self.recipes)
        defaults = ModelConfig()
        scales = ["" if scale == defaults.model_scale else f"-r{decimal(scale)}" for scale in self.model_scales]
        experts = ["" if count == defaults.num_experts else f"-n{count}" for count in self.num_experts]
        return [
            f"{dataset}-{backbone}-{method}{scale}{count}"
            for dataset in self.datasets
            for backbone in self.backbones
            for method in self.methods
            for scale in (scales if method_traits(method).scaled else [""])
            for count in (experts if method_traits(method).routed else [""])
        ]


class SweepFile(BaseModel):
    """The runs of a sweep, and the attacks of their evaluations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grids: tuple[Grid, ...] = Field(min_length=1)
    preset: tuple[str, ...] = PRESET

    @field_validator("preset", mode="before")
    @classmethod
    def _check_preset(cls, preset: Any) -> tuple[str, ...]:
        names = [preset] if isinstance(preset, str) else preset
        if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"must be quick, standard, full or a list of attacks, not {short_repr(preset)}")
        return tuple(names)


# The paper's tables and figures, and sweep files


def _table(name: str) -> Callable[[], Grid]:
    return lambda: Grid(recipes=tuple(cell.recipe for cell in printed_cells() if cell.table == name))


PAPER: dict[str, Callable[[], Grid]] = {
    "a1": _table("A1"),
    "a2": _table("A2"),
    "fig7": _table("A2"),  # appendix: "the statistics in this table are associated with the plots in Fig. 7"
    "figA2": Grid,
}


def read_sweep(what: str) -> SweepFile:
    """A table or figure of the paper by its name, or a YAML file. Raises UserError if it is neither."""
    if what.endswith((".yaml", ".yml")):
        return _from_file(Path(what))
    if what not in PAPER:
        raise UserError(
            f"unknown sweep '{what}', neither a file (FILE.yaml) nor a table or figure of the paper: {nearest(what, list(PAPER))}"
        )
    return SweepFile(grids=(PAPER[what](),))


def _from_file(path: Path) -> SweepFile:
    tree = read_mapping(path)
    shared = {name: tree.pop(name) for name in ("preset",) if name in tree}
    if "grids" not in tree:
        return _parsed(SweepFile, {"grids": (_grid(tree, str(path)),), **shared}, str(path))
    for name in tree:
        if name != "grids":
            raise UserError(f"{path}: unknown field {short_name(name)!r} beside grids: there is preset")
    grid_trees = tree["grids"]
    if not isinstance(grid_trees, list) or not 1 <= len(grid_trees) <= MAX_RUNS:
        raise UserError(f"{path}: grids must be a list of grids, not {short_repr(grid_trees)}")
    grids = tuple(_grid(item, f"{path}: grids[{number}]") for number, item in enumerate(grid_trees))
    runs = sum(grid.size for grid in grids)
    if runs > MAX_RUNS:
        raise UserError(f"{path}: plans {runs} runs, at most {MAX_RUNS} are allowed; some lists are too long")
    return _parsed(SweepFile, {"grids": grids, **shared}, str(path))


def _grid(tree: Any, where: str) -> Grid:
    if not isinstance(tree, Mapping):
        raise UserError(f"{where} must be a mapping of fields, not {short_repr(tree)}")
    return _parsed(Grid, tree, where)


def _parsed(model_class: type[Model], tree: Mapping[str, Any], where: str) -> Model:
    """The model of `tree`. Raises UserError, in one line, for the first invalid field."""
    try:
        return model_class.model_validate(tree)
    except UserError as error:  # of a recipe or a configuration
        raise UserError(f"{where}: {error}") from None
    except ValidationError as error:
        raise UserError(f"{where}: {one_line(error, model_class)}") from None

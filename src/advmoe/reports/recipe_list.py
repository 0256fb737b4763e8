"""The list of recipes. Costs come from a table, so listing builds no network and does not import torch.

`scripts/update_docs.py` writes the table.
"""

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from advmoe.config import RunConfig, StoredConfig
from advmoe.config.schema import fraction_text
from advmoe.errors import UserError, nearest
from advmoe.recipes import method_traits

TABLE = Path(__file__).with_name("recipe_costs.csv")


class RecipeCost(NamedTuple):
    """Parameters and ideal GMACs of a recipe's network, and of the dense one."""

    params: int
    gmacs: float
    params_dense: int
    gmacs_dense: float

    @property
    def is_dense(self) -> bool:
        return (self.params, self.gmacs) == (self.params_dense, self.gmacs_dense)


class RecipeRow(BaseModel):
    """A recipe: its configuration and cost."""

    name: str
    config: StoredConfig
    params: int
    gmacs_ideal: float
    gmacs_dense: float


@cache
def recipe_costs() -> dict[str, RecipeCost]:
    """Recipe -> costs, from the table."""
    with TABLE.open(newline="") as file:
        return {
            row["recipe"]: RecipeCost(int(row["params"]), float(row["gmacs"]), int(row["params_dense"]), float(row["gmacs_dense"]))
            for row in csv.DictReader(file)
        }


def less(gmacs: float, dense: float) -> float:
    """The percentage by which `gmacs` is less than `dense`."""
    return 100 * (1 - gmacs / dense)


def chosen_recipes(recipes: Mapping[str, RunConfig], part: str) -> dict[str, RunConfig]:
    """The recipes with `part` in their names. Raises UserError if there is none."""
    matches = {name: config for name, config in recipes.items() if part in name}
    if not matches:
        words = {word for name in recipes for word in name.split("-")}
        others = "any DATASET-BACKBONE-METHOD is a recipe too, such as folder-resnet18-advmoe"
        raise UserError(f"no listed recipe has '{part}' in its name: {nearest(part, list(words))}; {others}")
    return matches


def recipe_rows(recipes: Mapping[str, RunConfig]) -> list[RecipeRow]:
    """Name, configuration and cost of recipes."""
    costs = recipe_costs()
    return [
        RecipeRow(
            name=name, config=config, params=costs[name].params, gmacs_ideal=costs[name].gmacs, gmacs_dense=costs[name].gmacs_dense
        )
        for name, config in recipes.items()
    ]


def recipe_lines(recipes: Mapping[str, RunConfig]) -> list[str]:
    """Settings and cost of recipes, one line each."""
    width = max(len(name) for name in recipes)
    head = f"{'recipe':{width}} {'epochs':>9} {'batch':>5}  {'training attack':28} {'parameters':>11} {'GMACs':>7} against dense"
    return [head, *(_recipe_line(name, config, width) for name, config in recipes.items())]


def _recipe_line(name: str, config: RunConfig, width: int) -> str:
    cost, training = recipe_costs()[name], config.training
    epochs = " + ".join([str(training.epochs)] * method_traits(config.method).phases)
    versus = "" if cost.is_dense else f"{-less(cost.gmacs, cost.gmacs_dense):+.0f} %"
    settings = f"{epochs:>9} {training.batch_size:5}  {_attack(config):28}"
    return f"{name:{width}} {settings} {cost.params:11,} {cost.gmacs:7.4f} {versus:>13}".rstrip()


def _attack(config: RunConfig) -> str:
    """'TRADES, 2 x 5/255 in 8/255'."""
    if not method_traits(config.method).attacked:
        return "none"
    loss = config.training.loss.upper().replace("_", "-")
    attack, epsilon = config.attack, fraction_text(config.attack.epsilon)
    step = f"{255 * attack.step:.3g}/255" if "/" in epsilon else f"{attack.step:.3g}"
    return f"{loss}, {attack.num_steps} x {step} in {epsilon}"

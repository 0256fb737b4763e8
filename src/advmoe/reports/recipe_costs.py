"""Costs of the listed recipes from a table, so that listing them builds no network. `scripts/update_recipe_costs.py` remakes it."""

import csv
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from advmoe.config import RunConfig
from advmoe.recipes import RECIPES
from advmoe.runs.cost import Estimate, dense_estimate, estimate

TABLE = Path(__file__).with_name("recipe_costs.csv")


class RecipeCost(NamedTuple):
    """The costs of a recipe's network and of the dense one."""

    network: Estimate
    dense: Estimate


def recipe_cost(name: str, config: RunConfig) -> RecipeCost:
    """From the table where `config` is the listed recipe of that name, else counted."""
    listed = table().get(name) if RECIPES.get(name) == config else None
    return listed or counted(config)


def counted(config: RunConfig) -> RecipeCost:
    """The same, counted on the networks' shapes."""
    return RecipeCost(estimate(config), dense_estimate(config))


@cache
def table() -> dict[str, RecipeCost]:
    """Recipe -> costs, as the file holds them."""
    with TABLE.open(newline="") as file:
        return {
            row["recipe"]: RecipeCost(
                Estimate(int(row["params"]), float(row["gmacs"])), Estimate(int(row["params_dense"]), float(row["gmacs_dense"]))
            )
            for row in csv.DictReader(file)
        }


def lines(names: Iterable[str]) -> list[str]:
    """The lines of the table, counted anew."""
    costs = {name: counted(RECIPES[name]) for name in names}
    head = "recipe,params,gmacs,params_dense,gmacs_dense"
    return [head, *(f"{name},{own.params},{own.gmacs!r},{dense.params},{dense.gmacs!r}" for name, (own, dense) in costs.items())]

"""Write the table of recipes' costs, which `advmoe recipes` prints: python scripts/update_recipe_costs.py."""

from collections.abc import Iterable

from advmoe.files import write_atomically
from advmoe.recipes import RECIPES
from advmoe.reports.recipe_list import TABLE
from advmoe.runs.cost import dense_estimate, estimate


def recipe_table(names: Iterable[str]) -> str:
    """The costs of these recipes as CSV, counted on the networks' shapes."""
    costs = {name: (estimate(RECIPES[name]), dense_estimate(RECIPES[name])) for name in names}
    rows = (f"{name},{network.params},{network.gmacs!r},{dense.params},{dense.gmacs!r}" for name, (network, dense) in costs.items())
    return "\n".join(["recipe,params,gmacs,params_dense,gmacs_dense", *rows]) + "\n"


if __name__ == "__main__":
    write_atomically(TABLE, recipe_table(RECIPES))

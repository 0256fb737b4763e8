"""`advmoe recipes`."""

import json

from advmoe.cli.arguments.recipes import RecipesArguments
from advmoe.recipes import GRAMMAR, RECIPES
from advmoe.reports.recipe_list import chosen_recipes, recipe_lines, recipe_rows


def run(arguments: RecipesArguments) -> None:
    chosen = chosen_recipes(RECIPES, arguments.part)
    if arguments.json:
        print(json.dumps([row.model_dump() for row in recipe_rows(chosen)]))
        return
    print(*recipe_lines(chosen), "", f"Any {GRAMMAR} is a recipe, listed or not.", sep="\n")

"""`advmoe recipes`."""

import json
from dataclasses import dataclass

import tyro

from advmoe.cli.parsing import Flag, parse
from advmoe.recipes import GRAMMAR, RECIPES
from advmoe.reports.costs import chosen_recipes, recipe_lines, recipe_rows


@dataclass(frozen=True)
class RecipesArguments:
    """List the recipes: settings, parameters and GMACs."""

    part: tyro.conf.Positional[str] = ""
    """Only those with this in their names."""
    json: Flag = False
    """Print JSON, with the whole configurations, instead of lines."""


def run(words: list[str]) -> None:
    arguments = parse(RecipesArguments, "recipes", words)
    chosen = chosen_recipes(RECIPES, arguments.part)
    if arguments.json:
        print(json.dumps(recipe_rows(chosen)))
        return
    print(*recipe_lines(chosen), "", f"Any {GRAMMAR} is a recipe, listed or not.", sep="\n")

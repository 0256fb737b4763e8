"""The arguments of `advmoe recipes`."""

from dataclasses import dataclass

import tyro

from advmoe.cli.parsing import Flag, parse


@dataclass(frozen=True)
class RecipesArguments:
    """List the recipes: settings, parameters and GMACs."""

    part: tyro.conf.Positional[str] = ""
    """Only those with this in their names."""
    json: Flag = False
    """Print JSON, with the whole configurations, instead of lines."""


def read(words: list[str]) -> RecipesArguments:
    return parse(RecipesArguments, "recipes", words)

"""The arguments of `advmoe recipes`."""

from dataclasses import dataclass

import tyro

from advmoe.cli.parsing import Flag, parse


@dataclass(frozen=True)
class RecipesArguments:
    """List the recipes: settings, parameters and GMACs."""

    part: tyro.conf.Positional[str] = ""
    """Only recipes whose name contains this text."""
    json: Flag = False
    """Print JSON, with complete configurations, instead of lines."""


def read(argv: list[str]) -> RecipesArguments:
    return parse(RecipesArguments, "recipes", argv)

"""The arguments of `advmoe recipes`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from advmoe.cli.parsing import Flag


@dataclass(frozen=True)
class RecipesArguments:
    """List the recipes: settings, parameters and GMACs."""

    part: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[TEXT]")] = ""
    """Only recipes whose name contains this text."""
    json: Flag = False
    """Print JSON, with complete configurations, instead of lines."""

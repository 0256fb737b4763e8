"""The arguments of `advmoe profile`."""

from dataclasses import dataclass

from advmoe.cli.parsing import Flag, Source, configured, parse
from advmoe.config import RunConfig
from advmoe.errors import UserError


@dataclass(frozen=True)
class ProfileArguments:
    """Print the number of parameters of a recipe's network, and its GMACs: billions of multiply-accumulates for one image."""

    source: Source
    run: RunConfig
    layers: Flag = False
    """Also print each layer."""
    paper: Flag = False
    """Instead of a recipe: compare the costs in the paper's tables with counted ones, and mark cells that cannot be right."""
    json: Flag = False
    """Print JSON instead of lines."""

    def __post_init__(self) -> None:
        if self.paper and (self.layers or self.source != Source() or self.run != RunConfig()):
            raise UserError("--paper takes no recipe and no other setting: it counts every cell of the paper's tables")


def read(argv: list[str]) -> ProfileArguments:
    run = RunConfig() if "--paper" in argv else configured(argv)
    return parse(ProfileArguments, "profile", argv, ProfileArguments(source=Source(), run=run))

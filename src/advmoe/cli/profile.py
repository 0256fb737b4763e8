"""`advmoe profile`."""

import json
from dataclasses import dataclass

from advmoe.cli.parsing import Flag, Source, configured, parse
from advmoe.config import RunConfig
from advmoe.errors import UserError
from advmoe.reports.costs import cost_lines, cost_row, judged_cells, judged_lines, judged_rows
from advmoe.runs.cost import dense_estimate, profile


@dataclass(frozen=True)
class ProfileArguments:
    """Print parameters and GMACs (multiply-accumulates of one image) of a recipe's network."""

    source: Source
    run: RunConfig
    layers: Flag = False
    """Print each layer, too."""
    paper: Flag = False
    """Instead of a recipe: the cost columns of the paper's tables beside the counts; cells that cannot be right are marked."""
    json: bool = False
    """Print JSON instead of lines."""

    def __post_init__(self) -> None:
        if self.paper and (self.layers or self.source != Source() or self.run != RunConfig()):
            raise UserError("--paper takes no recipe and no other setting: it counts every cell of the paper's tables")


def run(words: list[str]) -> None:
    run = RunConfig() if "--paper" in words else configured(words)
    arguments = parse(ProfileArguments, "profile", words, ProfileArguments(source=Source(), run=run))
    if arguments.paper:
        judged = judged_cells()
        print(json.dumps(judged_rows(judged)) if arguments.json else "\n".join(judged_lines(judged)))
        return
    own, dense = profile(arguments.run), dense_estimate(arguments.run)
    if arguments.json:
        print(json.dumps(cost_row(own, dense, arguments.layers)))
        return
    print(*cost_lines(own, dense, arguments.layers), sep="\n")
    if arguments.run.method == "at_sparse":
        print("counted without the masked channels: the compact network is what is evaluated")

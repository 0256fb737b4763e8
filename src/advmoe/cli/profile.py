"""`advmoe profile`."""

import json

from advmoe.cli.arguments.profile import ProfileArguments
from advmoe.reports.costs import cost_lines, cost_row
from advmoe.reports.paper_costs import judged_cells, judged_lines, judged_rows
from advmoe.runs.cost import dense_estimate, profile


def run(arguments: ProfileArguments) -> None:
    if arguments.paper:
        judged = judged_cells()
        print(json.dumps(judged_rows(judged)) if arguments.json else "\n".join(judged_lines(judged)))
        return
    network, dense = profile(arguments.run), dense_estimate(arguments.run)
    if arguments.json:
        print(json.dumps(cost_row(network, dense, arguments.layers).model_dump(exclude_none=True)))
        return
    print(*cost_lines(network, dense, arguments.layers), sep="\n")
    if arguments.run.method == "at_sparse":
        print("counted without the masked channels: the compact network is what is evaluated")

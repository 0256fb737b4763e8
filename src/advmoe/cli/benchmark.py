"""`advmoe benchmark`."""

from advmoe.benchmark.runner import run as measure
from advmoe.benchmark.setup import QUICK, Scale, Setup
from advmoe.cli.arguments.benchmark import BenchmarkArguments
from advmoe.cli.device import set_up_device


def run(arguments: BenchmarkArguments) -> None:
    """`advmoe benchmark`. Raises SystemExit with status 1 if a row failed."""
    torch_device = set_up_device(arguments.runtime.config)
    scale = QUICK if arguments.quick else Scale(width=arguments.width, rounds=arguments.rounds)
    setup = Setup(torch_device, scale, arguments.quick, arguments.runs)
    rows = measure(arguments.suite, arguments.json, lambda line: print(line, flush=True), setup)
    if any(row.failed for row in rows):
        raise SystemExit(1)

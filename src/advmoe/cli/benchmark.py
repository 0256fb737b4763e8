"""`advmoe benchmark`."""

from dataclasses import dataclass
from pathlib import Path

from advmoe.benchmark import SUITES
from advmoe.benchmark import run as measure
from advmoe.cli.parsing import device, parse
from advmoe.config import RuntimeConfig


@dataclass(frozen=True)
class BenchmarkArguments:
    """Measure whether networks, iterations and attacks are as fast as their cost says: ratios of variants that take turns."""

    suite: tuple[str, ...] = ()
    """Only these suites; by default all. Each takes up to 5 minutes on two cores, growth a little more."""
    json: Path | None = None
    """Write rows of name, ratio, target, met and spread, with the machine and the medians, to this file."""
    device: str = "auto"
    """Torch device; auto takes CUDA where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""


def run(words: list[str]) -> None:
    """`advmoe benchmark`."""
    arguments = parse(BenchmarkArguments, "benchmark", words)
    place = device(RuntimeConfig(arguments.device, arguments.threads))
    measure(arguments.suite or tuple(SUITES), arguments.json, lambda line: print(line, flush=True), device=place)

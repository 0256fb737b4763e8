"""`advmoe benchmark`."""

from dataclasses import dataclass
from pathlib import Path

from advmoe.benchmark.runner import run as measure
from advmoe.benchmark.setup import QUICK, Scale, Setup
from advmoe.cli.parsing import Flag, device, parse
from advmoe.config import RuntimeConfig


@dataclass(frozen=True)
class BenchmarkArguments:
    """Measure whether networks, iterations and attacks are as fast as their cost says: ratios of variants that take turns."""

    suite: tuple[str, ...] = ()
    """Suites: inference, training, memory, attack, data, growth (these six by default), operators, dispatch, precision, export,
    low_precision, scaling, streaming, rerouting, cuda. Each takes minutes."""
    json: Path | None = None
    """Write all rows, with the machine and the versions, to this file."""
    runs: tuple[Path, ...] = ()
    """Folders of trained runs, for the suite low_precision."""
    quick: Flag = False
    """Tiny networks and one round: shows that a suite runs; its numbers mean nothing."""
    device: str = "auto"
    """Torch device; auto takes CUDA where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""


def run(words: list[str]) -> None:
    """`advmoe benchmark`. Exit status 1 where a row failed."""
    arguments = parse(BenchmarkArguments, "benchmark", words)
    where = device(RuntimeConfig(device=arguments.device, threads=arguments.threads))
    setup = Setup(where, QUICK if arguments.quick else Scale(), arguments.quick, arguments.runs)
    rows = measure(arguments.suite, arguments.json, lambda line: print(line, flush=True), setup)
    if any(row.failed for row in rows):
        raise SystemExit(1)

"""`advmoe demo`."""

from dataclasses import dataclass, field
from pathlib import Path

from advmoe.cli.parsing import console, device, parse
from advmoe.config import RuntimeConfig
from advmoe.demo import demo


@dataclass(frozen=True)
class DemoArguments:
    """Train and evaluate four methods on embedded images: a few minutes on two cores."""

    out: Path = Path("demo")
    """Folder for runs, records.json and figures."""
    seed: int = 0
    """Seed of the four runs."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def run(words: list[str]) -> None:
    arguments = parse(DemoArguments, "demo", words)
    demo(arguments.out, console(), arguments.runtime, device(arguments.runtime), arguments.seed)

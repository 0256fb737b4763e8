"""The arguments of `advmoe demo`."""

from dataclasses import dataclass, field
from pathlib import Path

from advmoe.config import RuntimeConfig


@dataclass(frozen=True)
class DemoArguments:
    """Train and evaluate four methods and a control (one expert) on images that come with the package, in about
    20 minutes on two cores."""

    out: Path = Path("demo")
    """Folder for the runs, records.json, report.html and figures."""
    seed: int = 0
    """Seed of all runs."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

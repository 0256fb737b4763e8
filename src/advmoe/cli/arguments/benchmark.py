"""The arguments of `advmoe benchmark`."""

from dataclasses import dataclass, field
from pathlib import Path

from advmoe.cli.parsing import DeviceOptions, Flag
from advmoe.errors import UserError, check_count


@dataclass(frozen=True)
class BenchmarkArguments:
    """Measure whether networks, iterations and attacks are as fast as their GMACs suggest. The variants of a comparison take
    turns, and the ratios of their times are printed."""

    suite: tuple[str, ...] = ()
    """Suites: inference, training, memory, attack, data, growth (these six by default), operators, iteration, dispatch, precision,
    export, low_precision, scaling, streaming, rerouting, independent, waiting, cuda. Each takes minutes."""
    json: Path | None = None
    """Write all rows, with the machine and the versions, to this file."""
    runs: tuple[Path, ...] = ()
    """Folders of trained runs, for the suites low_precision and independent."""
    quick: Flag = False
    """Use tiny networks and one round, to test that a suite runs; the numbers mean nothing."""
    rounds: int | None = None
    """Rounds of every comparison, instead of the number that gives a stable median."""
    width: int | None = None
    """Channels of the networks' first stage, instead of the published ones. The suites inference, training, memory, attack, data,
    growth, operators, iteration, precision and export use it."""
    runtime: DeviceOptions = field(default_factory=DeviceOptions)

    def __post_init__(self) -> None:
        for name, value in (("rounds", self.rounds), ("width", self.width)):
            if value is None:
                continue
            check_count(name, value)
            if self.quick:
                raise UserError(f"--quick sets {name}: leave out one of the two")

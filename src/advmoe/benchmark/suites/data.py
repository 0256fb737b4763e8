"""Time of loading and augmenting images in memory, relative to the iteration that uses them. About a minute."""

from collections.abc import Iterator

from advmoe.benchmark import variants
from advmoe.benchmark.rows import Row, compare
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.timing import timed


def measure(setup: Setup) -> Iterator[Row]:
    """The share."""
    scale, device = setup.scale, setup.device
    config = variants.configuration("AdvMoE", scale)
    calls = {
        "loading": variants.loading(config, scale, device),
        "AdvMoE iteration": variants.iteration(config, scale.side, device),
    }
    seconds = timed(calls, setup.rounds(8), device)
    yield from compare("data", f"batch {scale.training_batch}", "s", seconds, [("loading", "AdvMoE iteration", "<= 0.03")])

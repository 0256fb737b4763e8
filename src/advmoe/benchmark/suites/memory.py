"""Peak memory of training iterations, each measured in a fresh process. About 2 minutes."""

from collections.abc import Iterator

from advmoe.benchmark.memory import measurable, probe
from advmoe.benchmark.rows import Row, compare
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.variants import configuration

ROUNDS = 2


def measure(setup: Setup) -> Iterator[Row]:
    """AdvMoE compared with AT (Dense). No rows if peak memory cannot be measured."""
    if not measurable(setup.device):
        return
    peaks: dict[str, list[float]] = {"AdvMoE": [], "AT (Dense)": []}
    for _ in range(setup.rounds(ROUNDS)):
        for name, values in peaks.items():
            values.append(float(probe(configuration(name, setup.scale), setup.scale.side, setup.device).memory))
    case = f"peak memory, iteration, ResNet-18, batch {setup.scale.training_batch}"
    yield from compare("memory", case, "bytes", peaks, [("AdvMoE", "AT (Dense)", "<= 0.72")])

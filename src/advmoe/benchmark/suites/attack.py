"""Evaluation attacks through the hard gate, with and without batch norms folded into the convolutions. About 2 minutes."""

from collections.abc import Iterator

from advmoe.benchmark import variants
from advmoe.benchmark.rows import Row, compare
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.timing import timed


def measure(setup: Setup) -> Iterator[Row]:
    """Images per second, and their ratios."""
    scale, device = setup.scale, setup.device
    calls = {kind: variants.attack(kind, scale, device) for kind in ("MoE", "small dense")}
    calls["MoE unfolded"] = variants.attack("MoE", scale, device, folded=False)
    seconds = timed(calls, setup.rounds(3), device)
    rates = {name: [scale.attack_batch / value for value in values] for name, values in seconds.items()}
    case = f"PGD-{scale.attack_steps} images a second, batch {scale.attack_batch}"
    yield from compare("attack", case, "images/s", rates, [("MoE", "small dense", ">= 0.75"), ("MoE", "MoE unfolded", None)])

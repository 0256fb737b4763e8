"""Iterations of AdvMoE compared with AT (Dense) and AT (S-Dense), in float32 and bfloat16, and compiled. About 15 minutes."""

from collections.abc import Iterator

from advmoe.benchmark import variants
from advmoe.benchmark.rows import Row, compare
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.timing import timed
from advmoe.benchmark.variants import METHOD, configuration
from advmoe.config.schema import Compile
from advmoe.training.compiled import has_compiler


def measure(setup: Setup) -> Iterator[Row]:
    """Times and their ratios."""
    scale, device = setup.scale, setup.device
    configs = {name: configuration(name, scale) for name in METHOD}
    case = f"iteration, ResNet-18, batch {scale.training_batch}"
    calls = {name: variants.iteration(config, scale.side, device) for name, config in configs.items()}
    targets = [("AdvMoE", "AT (Dense)", "<= 0.75"), ("AdvMoE", "AT (S-Dense)", "<= 2.4")]
    yield from compare("training", case, "s", timed(calls, setup.rounds(7), device, scale.warm_up), targets)
    both = {name: calls[name] for name in ("AdvMoE", "AT (Dense)")}
    lower = {f"{name} bf16": variants.iteration(variants.bf16(configs[name]), scale.side, device) for name in both}
    ratios = [("AdvMoE", "AdvMoE bf16", ">= 2.0"), ("AT (Dense)", "AT (Dense) bf16", None)]
    yield from compare("training", f"{case}, bf16", "s", timed(both | lower, setup.rounds(5), device, scale.warm_up), ratios)
    if setup.device.type == "cuda" or (has_compiler() and not setup.quick):
        mode: Compile = "graphs" if setup.device.type == "cuda" else "inductor"
        config = variants.compiled_run(configs["AdvMoE"], mode)
        both = {"AdvMoE": calls["AdvMoE"], f"AdvMoE {mode}": variants.iteration(config, scale.side, device)}
        seconds = timed(both, setup.rounds(5), device, scale.warm_up)
        yield from compare("training", f"{case}, compiled", "s", seconds, [("AdvMoE", f"AdvMoE {mode}", None)])

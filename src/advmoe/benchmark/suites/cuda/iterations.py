"""Training iterations of AdvMoE with every dispatch, compared with those of AT (Dense) and AT (S-Dense)."""

from collections.abc import Iterator
from functools import partial
from statistics import median

from advmoe.benchmark.memory import measurable, peak
from advmoe.benchmark.rows import Row
from advmoe.benchmark.suites.cuda.common import Part, failure, title
from advmoe.benchmark.suites.cuda.networks import route
from advmoe.benchmark.timing import timed
from advmoe.benchmark.variants import Call, configuration, iteration
from advmoe.config import RunConfig, RuntimeConfig

ITERATIONS, EPOCHS = 390, 100  # an epoch of 50,000 images at batch 128
HUNDRED_EPOCHS = "100 epochs of CIFAR-10"


def iterations(part: Part) -> Iterator[Row]:
    """The time of all variants, which run in turn; the minutes of a full run; and the peak memory."""
    calls: dict[str, Call] = {}
    peaks: dict[str, float | None] = {}
    for method, dispatch in [("AT (Dense)", None), ("AT (S-Dense)", None), *(("AdvMoE", name) for name in part.dispatches)]:
        name = title(method, dispatch)
        try:
            call = step(part, method, dispatch)
            call()
            peaks[name] = peak(call, part.device) if measurable(part.device) else None
            calls[name] = call
        except Exception as error:  # after any error, the remaining variants are still measured
            yield failure(f"iterations, {name}", "time", error)
    for name, seconds in timed(calls, 3 * part.rounds, part.device).items():
        case, typical = f"iterations, {name}", median(seconds)
        spread = (min(seconds), max(seconds))
        yield Row(suite="cuda", case=case, what="time", value=typical, unit="s", spread=spread)
        yield Row(suite="cuda", case=case, what=HUNDRED_EPOCHS, value=typical * ITERATIONS * EPOCHS / 60, unit="min")
        yield Row(suite="cuda", case=case, what="peak memory", value=peaks[name], unit="bytes")


def step(part: Part, method: str, dispatch: str | None) -> Call:
    """A training iteration, as in `advmoe train`."""
    config: RunConfig = configuration(method, part.scale)
    precision = RuntimeConfig(device=part.device.type, precision="bfloat16" if part.cuda else "float32")
    call = iteration(config.replace(runtime=precision), part.scale.side, part.device)
    assert isinstance(call, partial)
    route(call.args[0].model, dispatch)
    return call

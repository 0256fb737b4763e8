"""Training iterations of AdvMoE with every dispatch, compared with those of AT (Dense) and AT (S-Dense)."""

from collections.abc import Iterator
from functools import partial
from statistics import median

from advmoe.benchmark.memory import measurable, peak
from advmoe.benchmark.rows import Row
from advmoe.benchmark.suites.cuda.common import Part, failure, title
from advmoe.benchmark.suites.cuda.networks import set_dispatch
from advmoe.benchmark.timing import timed
from advmoe.benchmark.variants import Call, configuration, iteration
from advmoe.config import RunConfig, RuntimeConfig
from advmoe.config.choices import Dispatch
from advmoe.config.schema import Compile
from advmoe.moe.dispatch import STATIC

ITERATIONS, EPOCHS = 390, 100  # an epoch of 50,000 images at batch 128
HUNDRED_EPOCHS = "100 epochs of CIFAR-10"


def iterations(part: Part) -> Iterator[Row]:
    """The time of all variants, which run in turn; the minutes of a full run; and the peak memory."""
    calls: dict[str, Call] = {}
    peaks: dict[str, float | None] = {}
    for method, dispatch, mode in variants(part):
        name = title(method, dispatch) + (f", {mode}" if mode != "none" else "")
        try:
            call = step(part, method, dispatch, mode)
            call()
            peaks[name] = peak(call, part.device) if measurable(part.device) else None
            calls[name] = call
        except Exception as error:  # after any error, the remaining variants are still measured
            yield failure(f"iterations, {name}", "time", error)
    for name, seconds in timed(calls, part.rounds(30), part.device).items():
        case, typical = f"iterations, {name}", median(seconds)
        spread = (min(seconds), max(seconds))
        yield Row(suite="cuda", case=case, what="time", value=typical, unit="s", spread=spread)
        yield Row(suite="cuda", case=case, what=HUNDRED_EPOCHS, value=typical * ITERATIONS * EPOCHS / 60, unit="min")
        yield Row(suite="cuda", case=case, what="peak memory", value=peaks[name], unit="bytes")


def variants(part: Part) -> list[tuple[str, Dispatch | None, Compile]]:
    """Method, dispatch and `compile` of each iteration. CUDA graphs come last: to trace an iteration takes longest."""
    direct: list[tuple[str, Dispatch | None, Compile]] = [("AT (Dense)", None, "none"), ("AT (S-Dense)", None, "none")]
    direct += [("AdvMoE", name, "none") for name in part.dispatches]
    return direct + [("AdvMoE", name, "graphs") for name in part.dispatches if part.cuda and name in STATIC]


def step(part: Part, method: str, dispatch: Dispatch | None, mode: Compile = "none") -> Call:
    """A training iteration, as in `advmoe train`."""
    config: RunConfig = configuration(method, part.scale)
    runtime = RuntimeConfig(device=part.device.type, precision="bfloat16" if part.cuda else "float32", compile=mode)
    call = iteration(config.replace(runtime=runtime), part.scale.side, part.device)
    assert isinstance(call, partial)
    set_dispatch(call.args[0].model, dispatch)
    return call

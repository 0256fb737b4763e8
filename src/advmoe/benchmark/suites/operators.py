"""The time of each part of an inference pass of ResNet-18, and the number of its operators (torch.profiler). Under a minute.

Measured for the small dense network, the MoE, and the MoE with all images on one expert, which needs no gather or scatter.
"""

from collections.abc import Callable, Iterator, Mapping

from torch.profiler import ProfilerActivity, profile

from advmoe.benchmark import variants
from advmoe.benchmark.rows import Row
from advmoe.benchmark.setup import Setup

Parts = Mapping[str, tuple[str, ...]]  # the operators of each part
PASSES, WARM_UP = 10, 3
PARTS = {
    "convolution": ("mkldnn_convolution", "mkldnn::_convolution_pointwise", "mkldnn::_convolution_pointwise_"),
    "gather": ("index_select",),
    "scatter": ("index_copy_",),
    "activation and addition": ("clamp_min_", "add_", "copy_"),  # the last copies shortcuts, which convolutions overwrite
    "pooling and routers": ("sum", "addmm", "mean", "div_", "argmax", "sub", "rsqrt", "mul"),
}


def measure(setup: Setup) -> Iterator[Row]:
    """The milliseconds of each part of a pass, and the number of operators."""
    scale = setup.scale
    calls = {kind: variants.inference(kind, scale, setup.device, "resnet18", scale.batch) for kind in ("small dense", "MoE")}
    calls["MoE, one expert"] = variants.to_one_expert(calls["MoE"])
    case = f"ResNet-18, batch {scale.batch}"
    for kind, call in calls.items():
        times, count = profiled(call, setup.rounds(PASSES), PARTS, {}, WARM_UP)
        for part, seconds in times.items():
            yield Row(suite="operators", case=f"{case}, {part}", what=kind, value=seconds, unit="s")
        yield Row(suite="operators", case=f"{case}, operators", what=kind, value=count, unit="count")


def profiled(call: Callable[[], object], passes: int, parts: Parts, spans: Parts, warm_up: int) -> tuple[dict[str, float], float]:
    """The seconds of each part of a call, and the number of operators called: means over `passes` calls, after `warm_up` calls.

    The time of a part in `parts` excludes the operators that its operators call; in `spans` it includes them.
    """
    for _ in range(warm_up):
        call()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(passes):
            call()
    events = {event.key.removeprefix("aten::"): event for event in trace.key_averages()}
    alone = {name: event.self_cpu_time_total / 1e6 / passes for name, event in events.items()}
    with_callees = {name: event.cpu_time_total / 1e6 / passes for name, event in events.items()}
    times = {part: sum(alone.get(name, 0.0) for name in names) for part, names in parts.items()}
    times |= {part: sum(with_callees.get(name, 0.0) for name in names) for part, names in spans.items()}
    total = sum(alone.values())
    count = sum(event.count for event in events.values() if event.key.startswith("aten::")) / passes
    return times | {"other": total - sum(times.values()), "all": total}, count

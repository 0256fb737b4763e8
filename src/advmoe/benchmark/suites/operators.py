"""The time of each part of an inference pass of ResNet-18, and the number of its operators (torch.profiler). Under a minute.

Measured for the small dense network, the MoE, and the MoE with all images on one expert, which needs no gather or scatter.
"""

from collections.abc import Callable, Iterator

from torch.profiler import ProfilerActivity, profile

from advmoe.benchmark import variants
from advmoe.benchmark.rows import Row
from advmoe.benchmark.setup import Setup

PASSES = 10
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
        times, count = profiled(call, setup.rounds(PASSES))
        for part, seconds in times.items():
            yield Row(suite="operators", case=f"{case}, {part}", what=kind, value=seconds, unit="s")
        yield Row(suite="operators", case=f"{case}, operators", what=kind, value=count, unit="count")


def profiled(call: Callable[[], object], passes: int) -> tuple[dict[str, float], float]:
    """The seconds of each part of a pass, and the number of operators called."""
    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(passes):
            call()
    events = trace.key_averages()
    seconds = {event.key.removeprefix("aten::"): event.self_cpu_time_total / 1e6 / passes for event in events}
    parts = {part: sum(seconds.get(name, 0.0) for name in names) for part, names in PARTS.items()}
    total = sum(seconds.values())
    count = sum(event.count for event in events if event.key.startswith("aten::")) / passes
    return parts | {"other": total - sum(parts.values()), "all": total}, count

"""Forward passes: batches, single images, many experts, another backbone, bfloat16, torch.compile. About 3 minutes."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from advmoe.benchmark import variants
from advmoe.benchmark.rows import Ratio, Row, compare
from advmoe.benchmark.setup import Setup
from advmoe.benchmark.timing import Calls, timed
from advmoe.benchmark.variants import KINDS
from advmoe.training.compiled import has_compiler


def measure(setup: Setup) -> Iterator[Row]:
    """Times and their ratios. An even route of the batch is the hardest case for a dispatch."""
    scale, device = setup.scale, setup.device

    def calls(*kinds: str, backbone: str = "resnet18", batch: int = scale.batch) -> dict[str, partial[Tensor]]:
        return {kind: variants.inference(kind, scale, device, backbone, batch) for kind in kinds}

    def rows(case: str, each: Calls, rounds: int, *ratios: Ratio) -> Iterator[Row]:
        return compare("inference", case, "s", timed(each, setup.rounds(rounds), device), ratios)

    batch = f"batch {scale.batch}"
    full = [("dense", "MoE", ">= 3.0"), ("MoE", "small dense", "<= 1.3"), ("16 experts", "MoE", "<= 1.3")]
    yield from rows(f"ResNet-18, {batch}", calls(*KINDS), 15, *full)
    skewed = {kind: variants.to_one_expert(call) for kind, call in calls("small dense", "MoE").items()}
    yield from rows(f"ResNet-18, {batch}, all on one expert", skewed, 15, ("MoE", "small dense", "<= 1.12"))
    single = [("dense", "MoE", ">= 2.2"), ("MoE", "small dense", None)]
    yield from rows("ResNet-18, batch 1", calls("dense", "small dense", "MoE", batch=1), 60, *single)
    yield from rows(f"WRN-28-10, {batch}", calls("dense", "MoE", backbone="wrn28_10"), 4, ("dense", "MoE", ">= 3.3"))
    both = calls("dense", "MoE")
    lower = {f"{kind} bf16": variants.in_bf16(call) for kind, call in both.items()}
    yield from rows(f"ResNet-18, {batch}, bf16", both | lower, 7, *((f"{kind} bf16", kind, None) for kind in both))
    if has_compiler() and not setup.quick:
        quick = {f"{kind} compiled": variants.compiled(kind, scale, device) for kind in both}
        ratios = [("dense compiled", "MoE compiled", None), *((f"{kind} compiled", kind, None) for kind in both)]
        yield from rows(f"ResNet-18, {batch}, compiled", both | quick, 7, *ratios)

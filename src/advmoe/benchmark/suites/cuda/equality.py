"""Compare every dispatch with a loop over images: values and gradients."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from advmoe.benchmark.rows import Row
from advmoe.benchmark.suites.cuda.common import Figure, Figures, Part, guarded
from advmoe.moe import DISPATCHES
from advmoe.moe.experts import FilterBank, windows

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative to the largest reference value


@dataclass(frozen=True)
class Layer:
    """A routed layer and its images."""

    channels: int
    width: int
    size: int
    kernel: int = 3
    stride: int = 1
    num_experts: int = 2
    bank: str = "disjoint"
    layout: torch.memory_format = torch.channels_last
    batch: int = 16


LAYERS = [
    Layer(64, 32, 16), Layer(32, 64, 16, stride=2), Layer(32, 64, 16, kernel=1, stride=2), Layer(256, 256, 4),
    Layer(51, 102, 8, bank="backbone"), Layer(25, 12, 9, stride=2, num_experts=4),
    Layer(64, 64, 8, layout=torch.contiguous_format), Layer(32, 32, 8, num_experts=16), Layer(32, 32, 8, num_experts=1),
    Layer(32, 32, 8, batch=1),
]  # fmt: skip
TINY = [Layer(3, 5, 4, stride=2, num_experts=3, bank="backbone", batch=4), Layer(3, 2, 3, layout=torch.contiguous_format, batch=3)]


def equality(part: Part) -> Iterator[Row]:
    """The largest error of y and of each gradient over all layers."""
    torch.backends.cudnn.allow_tf32 = False
    for name in part.dispatches:
        for case, dtype in cases(part, name).items():
            yield from guarded("equality", case, partial(worst, part, name, dtype))


def cases(part: Part, name: str) -> dict[str, torch.dtype]:
    """The cases of a dispatch: one for each data type."""
    return {f"{name}, {str(dtype).removeprefix('torch.')}": dtype for dtype in (TOLERANCES if part.cuda else [torch.float32])}


def worst(part: Part, name: str, dtype: torch.dtype) -> Figures:
    """The relative error of each tensor. Raises ValueError if one is above the tolerance."""
    errors: dict[str, float] = {}
    for layer in TINY if part.quick else LAYERS:
        for tensor, error in compare(layer, name, dtype, part.device).items():
            errors[tensor] = max(errors.get(tensor, 0.0), error)
    if not max(errors.values()) <= TOLERANCES[dtype]:
        raise ValueError(f"differs from the loop: {errors}")
    return {f"relative error of {tensor}": Figure(100 * error, "%") for tensor, error in errors.items()}


def compare(layer: Layer, name: str, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Errors relative to the largest value of the loop, which runs in float64 on the same rounded numbers."""
    random = torch.Generator().manual_seed(layer.channels)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    x = noise(layer.batch, layer.channels, layer.size, layer.size).to(dtype).contiguous(memory_format=layer.layout)
    starts, _, size = windows(layer.bank, layer.num_experts, 2 * layer.width - layer.width // 2, layer.width)
    bank = (noise(size, layer.channels, layer.kernel, layer.kernel) / (layer.channels * layer.kernel**2) ** 0.5).to(dtype).float()
    experts = torch.randint(0, layer.num_experts, (layer.batch,), generator=random).to(device)
    inputs = {"x": x, "bank": bank, "bias": noise(layer.num_experts, layer.width), "one_hot": one_hot(experts, layer.num_experts)}
    ours = {key: value.to(dtype if key == "x" else torch.float32).requires_grad_() for key, value in inputs.items()}
    true = {key: value.detach().double().requires_grad_() for key, value in inputs.items()}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        bank_of_layer = FilterBank(ours["bank"], starts, layer.width, layer.stride, ours["bias"], name)
        y = DISPATCHES[name](ours["x"], bank_of_layer, experts, ours["one_hot"])
    slow = loop(true["x"], FilterBank(true["bank"], starts, layer.width, layer.stride, true["bias"]), true["one_hot"])
    probe = noise(*slow.shape).to(dtype)
    gradients = torch.autograd.grad(y, list(ours.values()), probe.to(y.dtype))
    true_gradients = torch.autograd.grad(slow, list(true.values()), probe.double())
    pairs = zip(("y", *ours), (y, *gradients), (slow, *true_gradients), strict=True)
    return {key: float((a.double() - b).detach().abs().max() / b.detach().abs().max()) for key, a, b in pairs}


def loop(x: Tensor, bank: FilterBank, weights: Tensor) -> Tensor:
    """Run every expert on one image after another, and sum the outputs with `weights` [B, N]."""
    rows = []
    for image, share in zip(x, weights, strict=True):
        parts = torch.stack([bank.convolve(image[None], e) for e in range(len(bank.starts))])
        rows.append((share[:, None, None, None, None] * parts).sum(dim=0))
    return torch.cat(rows)

"""Full networks: inference, the pass of an attack step, CUDA graphs and torch.compile."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor

from advmoe.benchmark.rows import Row
from advmoe.benchmark.suites.cuda.common import Figure, Figures, Part, graphed, guarded, milliseconds, title
from advmoe.benchmark.timing import stopwatch
from advmoe.benchmark.variants import Call, channels_last, fused_network, route_choices
from advmoe.config.choices import Dispatch
from advmoe.models import Classifier
from advmoe.moe import HARD, ForcedGate, Gate

network_once = lru_cache(fused_network)


def passes(part: Part, kind: str, dispatch: Dispatch | None, batch: int) -> dict[str, Call]:
    """Inference, and the pass of an attack step (the gradient of a loss to the images), of a fused network on an even route."""
    model = network_once(kind, part.scale, part.device)
    set_dispatch(model, dispatch)
    x, gate = channels_last(batch, part.scale, part.device), even_gate(model, batch, part.device)
    return {
        "inference": partial(logits, part, model.forward_routed, x, gate),
        "attack": partial(attack, part, model, x, gate),
    }


def set_dispatch(model: Classifier, dispatch: Dispatch | None) -> None:
    """Set the dispatch of all layers, if one is named."""
    if dispatch is not None:
        model.set_dispatch(dispatch)


def even_gate(model: Classifier, batch: int, device: torch.device) -> Gate:
    """A gate with a random and even route, for networks with MoE layers."""
    choices = route_choices(model)
    return HARD if choices is None else ForcedGate(torch.randint(0, choices[0], (batch, choices[1])).to(device))


def logits(part: Part, forward: Callable[..., tuple[Tensor, object]], x: Tensor, gate: Gate) -> Tensor:
    """The logits of a forward pass."""
    with torch.inference_mode(), part.bf16():
        return forward(x, gate)[0]


def attack(part: Part, model: Classifier, x: Tensor, gate: Gate) -> Tensor:
    """The gradient of a loss with respect to the images."""
    leaf = x.detach().requires_grad_()
    with part.bf16():
        y = model.forward_routed(leaf, gate)[0]
    return torch.autograd.grad(y.float().logsumexp(dim=1).sum(), leaf)[0]


def variants(part: Part) -> list[tuple[str, Dispatch | None]]:
    """The kinds of network with their dispatches."""
    return [("dense", None), ("small dense", None), *(("MoE", name) for name in part.dispatches)]


def inference(part: Part) -> Iterator[Row]:
    """The time of both passes, called directly and as a replayed CUDA graph."""
    for batch in (part.scale.batch, 1):
        for kind, dispatch in variants(part):
            for what in ("inference", "attack"):
                name = f"{what}, batch {batch}, {title(kind, dispatch)}"
                yield from guarded("networks", name, partial(direct_and_graphed, part, kind, dispatch, batch, what))


def direct_and_graphed(part: Part, kind: str, dispatch: Dispatch | None, batch: int, what: str) -> Figures:
    """The time of a pass, and as a CUDA graph if its shapes are static."""
    call = passes(part, kind, dispatch, batch)[what]
    figures = {"time": milliseconds(part, call)}
    if part.cuda and dispatch != "split":  # split makes the host wait
        figures["time as a graph"] = milliseconds(part, graphed(call))
    return figures


def compiled(part: Part) -> Iterator[Row]:
    """Inference with torch.compile. The first call, which compiles, is timed separately."""
    for kind, dispatch in variants(part):
        yield from guarded("compiled", title(kind, dispatch), partial(compiled_inference, part, kind, dispatch))


def compiled_inference(part: Part, kind: str, dispatch: Dispatch | None) -> Figures:
    """The time of the first call and of later calls."""
    torch._dynamo.reset()
    model = network_once(kind, part.scale, part.device)
    set_dispatch(model, dispatch)
    x, gate = channels_last(part.scale.batch, part.scale, part.device), even_gate(model, part.scale.batch, part.device)
    # on the CPU the backend "eager" needs no compiler and shows that the network can be traced
    compiler = partial(torch.compile, mode="reduce-overhead") if part.cuda else partial(torch.compile, backend="eager")
    quick = compiler(model.forward_routed, dynamic=False)
    call = partial(logits, part, quick, x, gate)
    return {"first call": Figure(stopwatch(call, part.device), "s"), "time": milliseconds(part, call)}

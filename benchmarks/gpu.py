"""Do all dispatches run on CUDA as they should, and how fast? One call of under 8 minutes.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json

equality   every dispatch against a loop over images, values and gradients
waits      whether a pass makes the host wait for the device, and how often an iteration does
iterations AdvMoE's iteration of every dispatch beside AT (Dense)'s and AT (S-Dense)'s; minutes of 100 epochs
inference  whole networks, and the pass of an attack step; each also as a CUDA graph
layers     the MoE layers of ResNet-18 one by one
compiled   whole networks through torch.compile(mode="reduce-overhead")

Every section is a process of its own, so that what crashes or hangs one takes no other along; a failure is a line of the table.
Convolutions are bf16 by autocast, routers float32, memory channels last, batches of 128. On the CPU (--device cpu --quick) it
shows only that it runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import conv2d, one_hot

from advmoe.benchmark.memory import measurable, peak
from advmoe.benchmark.rows import machine
from advmoe.benchmark.timing import stopwatch, timed, wait_for
from advmoe.benchmark.variants import KINDS, Call, Scale, channels_last, configuration, iteration, network, places, spec, twin
from advmoe.config import RunConfig, RuntimeConfig
from advmoe.files import write_json
from advmoe.models import Classifier
from advmoe.moe import DISPATCHES, HARD, Dispatch, Gate, MoEConv2d
from advmoe.moe.dispatch import available
from advmoe.moe.experts import FilterBank, windows

SECONDS = 460  # of the whole call
ITERATIONS = 390  # an epoch of 50,000 images at batch 128
EPOCHS = 100
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest true value
Figures = dict[str, Any]
Row = dict[str, Any]  # "name", and figures or "failed"


@dataclass(frozen=True)
class Setup:
    """Where and how large."""

    device: torch.device
    quick: bool
    without: tuple[str, ...] = ()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def scale(self) -> Scale:
        return Scale(width=8, side=8, batch=4, training_batch=4) if self.quick else Scale(batch=128)

    @property
    def rounds(self) -> int:
        return 1 if self.quick else 10

    @property
    def dispatches(self) -> list[str]:
        """Those that run here, but `without` some; our own kernels last, as a fault in them would end the process."""
        return [name for name in available(self.device) if name in DISPATCHES and name not in self.without]

    def bf16(self) -> torch.autocast:
        """bf16 on CUDA. No cached casts: a graph would keep them."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda, cache_enabled=False)


def guarded(name: str, measure: Callable[[], Figures]) -> Row:
    """A row, also of what fails."""
    try:
        return {"name": name, **measure()}
    except Exception as error:  # whatever it is, the rest is to be measured
        return {"name": name, "failed": first_line(error)}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]


# Equality


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


def equality(setup: Setup) -> Iterator[Row]:
    """The largest error of y and of any gradient over all layers."""
    torch.backends.cudnn.allow_tf32 = False
    for name in setup.dispatches:
        for dtype in TOLERANCES if setup.cuda else [torch.float32]:
            short = str(dtype).removeprefix("torch.")
            yield guarded(f"{name}, {short}", partial(worst, setup, name, dtype))


def worst(setup: Setup, name: str, dtype: torch.dtype) -> Figures:
    errors: dict[str, float] = {}
    for layer in TINY if setup.quick else LAYERS:
        for tensor, error in compared(layer, name, dtype, setup.device).items():
            errors[tensor] = max(errors.get(tensor, 0.0), error)
    if not max(errors.values()) <= TOLERANCES[dtype]:
        raise ValueError(f"differs from the loop: {errors}")
    return {"worst": max(errors.values()), "tolerance": TOLERANCES[dtype], "errors": errors}


def compared(layer: Layer, name: str, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Errors relative to the largest true value; the loop runs in float64 on the same rounded numbers."""
    random = torch.Generator().manual_seed(layer.channels)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    x = noise(layer.batch, layer.channels, layer.size, layer.size).to(dtype).contiguous(memory_format=layer.layout)
    starts, size = windows(layer.bank, layer.num_experts, 2 * layer.width - layer.width // 2, layer.width)
    bank = (noise(size, layer.channels, layer.kernel, layer.kernel) / (layer.channels * layer.kernel**2) ** 0.5).to(dtype).float()
    experts = torch.randint(0, layer.num_experts, (layer.batch,), generator=random).to(device)
    inputs = {"x": x, "bank": bank, "bias": noise(layer.num_experts, layer.width), "one_hot": one_hot(experts, layer.num_experts)}
    ours = {key: value.to(dtype if key == "x" else torch.float32).requires_grad_() for key, value in inputs.items()}
    true = {key: value.detach().double().requires_grad_() for key, value in inputs.items()}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        own = FilterBank(ours["bank"], starts, layer.width, layer.stride, ours["bias"], name)
        y = DISPATCHES[name](ours["x"], own, experts, ours["one_hot"])
    slow = loop(true["x"], FilterBank(true["bank"], starts, layer.width, layer.stride, true["bias"]), true["one_hot"])
    probe = noise(*slow.shape).to(dtype)
    found = torch.autograd.grad(y, list(ours.values()), probe.to(y.dtype))
    wanted = torch.autograd.grad(slow, list(true.values()), probe.double())
    pairs = zip(("y", *ours), (y, *found), (slow, *wanted), strict=True)
    return {key: float((a.double() - b).detach().abs().max() / b.detach().abs().max()) for key, a, b in pairs}


def loop(x: Tensor, own: FilterBank, weights: Tensor) -> Tensor:
    """Every expert on one image after the other, weighed."""
    rows = []
    for image, share in zip(x, weights, strict=True):
        parts = torch.stack([own.convolve(image[None], e) for e in range(len(own.starts))])
        rows.append((share[:, None, None, None, None] * parts).sum(dim=0))
    return torch.cat(rows)


# Waits of the host


def waits(setup: Setup) -> Iterator[Row]:
    """Passes under torch's alarm for host waits, which raises; iterations under the one that counts."""
    for name in setup.dispatches:
        for what, call in passes(setup, "MoE", name, setup.scale.batch).items():
            yield guarded(f"{what}, {name}", partial(alarmed, setup, call))
    for name in setup.dispatches:
        yield guarded(f"AdvMoE iteration, {name}", partial(counted, setup, name))


def alarmed(setup: Setup, call: Call) -> Figures:
    call()
    wait_for(setup.device)
    try:
        with alarm(setup, "error"):
            call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return {"waits": True}
    return {"waits": False if setup.cuda else None}


def counted(setup: Setup, dispatch: str) -> Figures:
    call = step(setup, "AdvMoE", dispatch)
    call()
    wait_for(setup.device)
    with warnings.catch_warnings(record=True) as heard, alarm(setup, "warn"):
        warnings.simplefilter("always")
        call()
    return {"waits": sum("synchroniz" in str(warning.message) for warning in heard) if setup.cuda else None}


@contextmanager
def alarm(setup: Setup, mode: str) -> Iterator[None]:
    if setup.cuda:
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        if setup.cuda:
            torch.cuda.set_sync_debug_mode("default")


# Whole networks


def passes(setup: Setup, kind: str, dispatch: str | None, batch: int) -> dict[str, Call]:
    """Inference and the pass of an attack step (the loss's gradient to the images) of a fused network over a fixed even route."""
    model = fused_network(setup, kind)
    route(model, dispatch)
    x, gate = channels_last(batch, setup.scale, setup.device), even(model, batch, setup.device)
    return {
        "inference": partial(inference, setup, model.forward_routed, x, gate),
        "attack": partial(attack, setup, model, x, gate),
    }


@lru_cache
def fused_network(setup: Setup, kind: str) -> Classifier:
    return twin(network(kind, "resnet18", setup.scale, setup.device))


def route(model: Classifier, dispatch: str | None) -> None:
    if dispatch is not None:
        model.set_dispatch(next(name for name in get_args(Dispatch) if name == dispatch))


def even(model: Classifier, batch: int, device: torch.device) -> Gate:
    """A random and even route, where there is anything to route."""
    chosen = places(model)
    return HARD if chosen is None else Gate("forced", route=torch.randint(0, chosen[0], (batch, chosen[1])).to(device))


def inference(setup: Setup, forward: Callable[..., tuple[Tensor, object]], x: Tensor, gate: Gate) -> Tensor:
    with torch.inference_mode(), setup.bf16():
        return forward(x, gate)[0]


def attack(setup: Setup, model: Classifier, x: Tensor, gate: Gate) -> Tensor:
    leaf = x.detach().requires_grad_()
    with setup.bf16():
        logits = model.forward_routed(leaf, gate)[0]
    return torch.autograd.grad(logits.float().logsumexp(dim=1).sum(), leaf)[0]


def variants(setup: Setup) -> list[tuple[str, str | None]]:
    """Kinds of network with their dispatches."""
    return [("dense", None), ("small dense", None), *(("MoE", name) for name in setup.dispatches)]


def networks(setup: Setup) -> Iterator[Row]:
    """Milliseconds of both passes, called one by one and as a replayed CUDA graph."""
    for batch in (setup.scale.batch, 1):
        for kind, dispatch in variants(setup):
            for what in ("inference", "attack"):
                name = f"{what}, batch {batch}, {titled(kind, dispatch)}"
                yield guarded(name, partial(both, setup, kind, dispatch, batch, what))


def titled(kind: str, dispatch: str | None) -> str:
    return kind if dispatch is None else f"{kind} {dispatch}"


def both(setup: Setup, kind: str, dispatch: str | None, batch: int, what: str) -> Figures:
    call = passes(setup, kind, dispatch, batch)[what]
    found = {"ms": milliseconds(setup, call)}
    if setup.cuda and dispatch != "split":  # which waits
        found["graph_ms"] = milliseconds(setup, graphed(call))
    return found


def milliseconds(setup: Setup, call: Call) -> float:
    """Median over rounds of calls in a row, after some that warm up."""
    many = 1 if setup.quick else 10

    def repeated() -> None:
        for _ in range(many):
            call()

    stopwatch(repeated, setup.device)
    return 1000 * median(stopwatch(repeated, setup.device) for _ in range(setup.rounds)) / many


def graphed(call: Call) -> Call:
    """The call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def compiled(setup: Setup) -> Iterator[Row]:
    """Inference through torch.compile; the first call, which compiles, apart."""
    for kind, dispatch in variants(setup):
        yield guarded(f"inference, compiled, {titled(kind, dispatch)}", partial(compiled_inference, setup, kind, dispatch))


def compiled_inference(setup: Setup, kind: str, dispatch: str | None) -> Figures:
    torch._dynamo.reset()
    model = fused_network(setup, kind)
    route(model, dispatch)
    x, gate = channels_last(setup.scale.batch, setup.scale, setup.device), even(model, setup.scale.batch, setup.device)
    # on the CPU a backend without a compiler: it shows that the network can be traced
    compiler = partial(torch.compile, mode="reduce-overhead") if setup.cuda else partial(torch.compile, backend="eager")
    quick = compiler(model.forward_routed, dynamic=False)
    call = partial(inference, setup, quick, x, gate)
    return {"compile_s": stopwatch(call, setup.device), "ms": milliseconds(setup, call)}


# Training iterations


def iterations(setup: Setup) -> Iterator[Row]:
    """All variants in turns, then the peak memory of each."""
    calls: dict[str, Call] = {}
    held: dict[str, float | None] = {}
    for method, dispatch in [("AT (Dense)", None), ("AT (S-Dense)", None), *(("AdvMoE", name) for name in setup.dispatches)]:
        title = titled(method, dispatch)
        tried = guarded(title, partial(warmed, setup, calls, method, dispatch))
        if "failed" in tried:
            yield tried
        else:
            held[title] = tried["peak_mb"]
    for title, seconds in timed(calls, 3 * setup.rounds, setup.device).items():
        typical = median(seconds)
        minutes = typical * ITERATIONS * EPOCHS / 60
        yield {
            "name": title, "ms": 1000 * typical, "least_ms": 1000 * min(seconds), "most_ms": 1000 * max(seconds),
            "minutes_100_epochs": minutes, "peak_mb": held[title],
        }  # fmt: skip


def warmed(setup: Setup, calls: dict[str, Call], method: str, dispatch: str | None) -> Figures:
    """Add an iteration that has run twice to `calls`."""
    call = step(setup, method, dispatch)
    call()
    held = peak(call, setup.device) / 2**20 if measurable(setup.device) else None
    calls[titled(method, dispatch)] = call
    return {"peak_mb": held}


def step(setup: Setup, method: str, dispatch: str | None) -> Call:
    """A training iteration as `advmoe train` runs it."""
    config: RunConfig = configuration(method, setup.scale)
    precision = RuntimeConfig(device=setup.device.type, precision="bfloat16" if setup.cuda else "float32")
    call = iteration(replace(config, runtime=precision), setup.scale.side, setup.device)
    assert isinstance(call, partial)
    route(call.args[0].model, dispatch)
    return call


# Layers


@dataclass(frozen=True)
class Place:
    """What an MoE layer of a network is given, and what it does."""

    channels: int
    size: int
    width: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        return f"{self.channels} -> {self.width}, {self.kernel}x{self.kernel}/{self.stride}, {self.size}x{self.size}"


def layers(setup: Setup) -> Iterator[Row]:
    """Milliseconds of every dispatch, and of dense and small dense convolutions, at each place; then summed over the network."""
    totals: dict[str, Counter[str]] = {}
    for place, times in found_places(setup).items():
        for what in ("forward", "forward_graph", "both_ways", "both_ways_graph"):
            if not what.endswith("graph") or setup.cuda:
                row = guarded(f"{place}, x{times}, {what}", partial(raced, setup, place, what))
                yield row
                for name, value in row.items():
                    if isinstance(value, float):
                        totals.setdefault(what, Counter())[name] += times * value  # type: ignore[assignment]
    for what, sums in totals.items():
        yield {"name": f"all layers, {what}", **sums}


def found_places(setup: Setup) -> Counter[Place]:
    """The MoE layers of ResNet-18, how often each."""
    model = network("MoE", "resnet18", setup.scale, setup.device)
    seen: Counter[Place] = Counter()

    def hook(layer: MoEConv2d, given: tuple[Any, ...], _: object) -> None:
        kernel = layer.filters.shape[-1]
        seen[Place(layer.in_channels, given[0].shape[-1], layer.width, kernel, layer.stride)] += 1

    for layer in model.moe_layers():
        layer.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.rand(2, *spec(setup.scale.side).shape).to(setup.device))
    return seen


def raced(setup: Setup, place: Place, what: str) -> Figures:
    """Milliseconds by variant; what fails has its reason instead."""
    found: Figures = {}
    for name in ("dense", "small dense", *setup.dispatches):
        if name == "split" and what.endswith("graph"):
            continue
        row = guarded(name, partial(layer_time, setup, place, name, what))
        found[name] = row.get("ms", row.get("failed"))
    return found


def layer_time(setup: Setup, place: Place, name: str, what: str) -> Figures:
    call = layer_call(setup, place, name, backward=what.startswith("both"))
    return {"ms": milliseconds(setup, graphed(call) if what.endswith("graph") else call)}


def layer_call(setup: Setup, place: Place, name: str, backward: bool) -> Call:
    """A pass of a plain convolution (of twice the channels if dense), or of a dispatch of two experts."""
    twice, dtype, device = 2 if name == "dense" else 1, torch.bfloat16 if setup.cuda else torch.float32, setup.device
    batch, filters = setup.scale.batch, place.width * (1 if name == "small dense" else 2)
    shape = (batch, twice * place.channels, place.size, place.size)
    x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_(backward)
    bank = torch.randn(filters, shape[1], place.kernel, place.kernel, device=device, dtype=dtype)
    bank = (bank / bank[0].numel() ** 0.5).contiguous(memory_format=torch.channels_last).requires_grad_(backward)
    experts = (torch.arange(batch) % 2).to(device)
    own = FilterBank(bank, (0, place.width), place.width, place.stride, None, name)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            y = DISPATCHES[name](x, own, experts, None) if name in DISPATCHES else conv2d(x, bank, None, place.stride, own.padding)
            if backward:
                torch.autograd.grad(y, (x, bank), y.detach())

    return run


SECTIONS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "equality": equality, "waits": waits, "iterations": iterations, "inference": networks, "layers": layers, "compiled": compiled,
}  # fmt: skip


# The call, and its processes


def main() -> int:
    """Run the sections one after the other; 1 where a row failed, 2 where there is nothing to run on."""
    arguments = parsed()
    setup = Setup(torch.device(arguments.device), arguments.quick, tuple(arguments.without))
    if setup.cuda and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu --quick shows that the benchmark runs", file=sys.stderr)
        return 2
    if arguments.part is not None:
        section(setup, arguments.sections[0], arguments.part)
        return 0
    ends = time.monotonic() + SECONDS
    found: dict[str, Any] = {"machine": machine(), "setup": {"quick": setup.quick, "device": str(setup.device)}, "sections": {}}
    found["setup"] |= {"scale": asdict(setup.scale), "kinds": {name: asdict(kind) for name, kind in KINDS.items()}}
    for name in arguments.sections:
        print(name, flush=True)
        rows = found["sections"][name] = separately(name, arguments, ends - time.monotonic())
        if name == "equality":
            arguments.without += unsound(rows, setup.dispatches)
        if arguments.out is not None:
            write_json(arguments.out, found, indent=1)
    failed = [row for rows in found["sections"].values() for row in rows if "failed" in row]
    print(f"{sum(map(len, found['sections'].values()))} rows, {len(failed)} failed")
    return 1 if failed else 0


def unsound(rows: Sequence[Row], dispatches: Sequence[str]) -> list[str]:
    """The dispatches that equality did not find right: they are not timed, and their faults meet nothing else."""
    wrong = [name for name in dispatches if any("failed" in row for row in rows if row["name"].startswith(f"{name},"))]
    return wrong + [name for name in dispatches if not any(row["name"].startswith(f"{name},") for row in rows)]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to see that it runs")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, help="JSON file; written after every section")
    parser.add_argument("--without", nargs="+", default=[], choices=DISPATCHES, help="dispatches to leave out")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)  # where a section's own process puts its rows
    return parser.parse_args()


def section(setup: Setup, name: str, part: Path) -> None:
    """What a process of its own does: one line of JSON for each row, and the row for reading."""
    for row in SECTIONS[name](setup):
        with part.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(shown(row), flush=True)


def separately(name: str, arguments: argparse.Namespace, seconds: float) -> list[Row]:
    """The rows of a section in a process of its own, which gets `seconds` at most."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "rows"
        part.touch()
        command = [sys.executable, __file__, "--sections", name, "--device", arguments.device, "--part", str(part)]
        command += ["--quick"] * arguments.quick + (["--without", *arguments.without] if arguments.without else [])
        why = ended(command, seconds)
        rows = [json.loads(line) for line in part.read_text().splitlines()]
    if why is not None:
        rows.append({"name": name, "failed": why})
        print(shown(rows[-1]), flush=True)
    return rows


def ended(command: list[str], seconds: float) -> str | None:
    """Why a process did not end well, if it did not."""
    try:
        status = subprocess.run(command, timeout=max(1.0, seconds), check=False).returncode
    except subprocess.TimeoutExpired:
        return f"stopped: the call's {SECONDS} s were over"
    return None if status == 0 else f"the process ended with status {status}"


def shown(row: Mapping[str, Any]) -> str:
    values = {name: value for name, value in row.items() if name not in ("name", "errors", "tolerance")}
    return f"  {row['name']:<46} " + "  ".join(f"{name} {short(value)}" for name, value in values.items())


def short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())

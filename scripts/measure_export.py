"""Is the exported network as fast as its cost says? ONNX Runtime's time of routed, small dense and dense ResNet-18 (r 0.5, N 2),
then PyTorch's and that of torch.export's files, with float32 convolutions and lower ones; batch 64 and 1.

    python scripts/measure_export.py --threads 1 2 --out results/export.json

ONNX Runtime's variants take turns among themselves, and PyTorch's after them: mixed, each would meet the other's threads, which
spin for a while after their work. Weights and images are random. The routers choose for themselves, their biases set so that
either expert gets half of the images, the hardest case; what the busier expert gets is told. "PyTorch" is what `advmoe
benchmark` runs: batch norms folded in, channels last, inference mode.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from advmoe.benchmark import Scale, variants
from advmoe.benchmark.rows import Found, Ratio, compared, write_found
from advmoe.benchmark.timing import timed
from advmoe.export import FORMATS, Dtype, Predictor, export, onnx_predictor
from advmoe.models import Classifier

CPU = torch.device("cpu")
ROUNDS = {64: 15, 1: 200}
TARGETS = {64: ">= 2.5", 1: ">= 2.0"}
KINDS = {"routed": "MoE", "small dense": "small dense", "dense": "dense"}
LOWER = ("routed", "dense")  # also measured with lower convolutions
Calls = Mapping[str, Callable[[Tensor], object]]


def networks(scale: Scale) -> dict[str, Classifier]:
    """One of each kind, from one seed."""
    made = {}
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        made[name] = variants.network(kind, "resnet18", scale, CPU)
    return made


def drawn(count: int, scale: Scale) -> Tensor:
    """Random images, the same ones each time."""
    return torch.rand(count, *variants.spec(scale.side).shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def evened(model: Classifier, pixels: Tensor) -> None:
    """Set each router's bias, layer by layer, so that half of the images choose either expert."""
    for place, layer in enumerate(model.moe_layers()):
        assert layer.router is not None
        logits = model.forward_routed(pixels)[1][place].logits
        layer.router.linear.bias[0] -= (logits[:, 0] - logits[:, 1]).quantile(0.5)


def written(models: Mapping[str, Classifier], scale: Scale, folder: Path, form: str, lower: Dtype) -> dict[str, Path]:
    """Files of one format: of each network, and of those in LOWER in the `lower` type."""
    dtypes: dict[str, tuple[str, Dtype]] = {name: (name, "float32") for name in models}
    dtypes |= {f"{name} {lower}": (name, lower) for name in LOWER}
    files = {}
    for title, (name, dtype) in dtypes.items():
        files[title] = folder / f"{title}.{form}"
        export(models[name], variants.spec(scale.side).shape, files[title], form, None, dtype, drawn(256, scale))
    return files


def in_onnx(files: Mapping[str, Path], threads: int) -> dict[str, Predictor]:
    """The files in ONNX Runtime."""
    return {f"{name}, ONNX": onnx_predictor(path, threads) for name, path in files.items()}


def in_torch(models: Mapping[str, Classifier], files: Mapping[str, Path]) -> Calls:
    """The networks as they are used, and their files."""
    own = {f"{name}, PyTorch": partial(passed, variants.twin(model), torch.channels_last) for name, model in models.items()}
    load = FORMATS["torch-export"].predictor
    exported = {f"{name}, torch.export": partial(passed, load(path), torch.contiguous_format) for name, path in files.items()}
    return {**own, **exported}


def passed(model: Callable[[Tensor], object], layout: torch.memory_format, pixels: Tensor) -> object:
    """A forward pass."""
    with torch.inference_mode():
        return model(pixels.contiguous(memory_format=layout))


def busier(predict: Predictor, pixels: Tensor) -> float:
    """The mean over layers of the share that a layer's busier expert gets."""
    ones = predict(pixels)[1].double().mean(dim=0)
    return torch.maximum(ones, 1 - ones).mean().item()


def taken(calls: Calls, scale: Scale) -> dict[int, dict[str, list[float]]]:
    """Seconds of each call, all taking turns, at each batch."""
    found = {}
    for batch, rounds in ROUNDS.items():
        pixels = drawn(batch, scale)
        found[batch] = timed({name: partial(call, pixels) for name, call in calls.items()}, rounds, CPU)
    return found


def ratios(batch: int) -> Iterator[Ratio]:
    """What is asked of them."""
    yield "dense, ONNX", "routed, ONNX", TARGETS[batch]
    yield "dense, ONNX", "small dense, ONNX", None
    yield "dense, PyTorch", "routed, PyTorch", None
    yield "dense, PyTorch", "small dense, PyTorch", None
    for name in KINDS:
        yield f"{name}, PyTorch", f"{name}, ONNX", None
    for name in LOWER:
        yield f"{name}, ONNX", f"{name} int8, ONNX", None
        yield f"{name}, torch.export", f"{name} bfloat16, torch.export", None
    yield "dense int8, ONNX", "routed int8, ONNX", None
    yield "dense bfloat16, torch.export", "routed bfloat16, torch.export", None


def measured(models: Mapping[str, Classifier], scale: Scale, folder: Path, counts: list[int]) -> Iterator[Found]:
    """The ratios with each number of threads."""
    onnx = written(models, scale, folder, "onnx", "int8")
    own = in_torch(models, written(models, scale, folder, "torch-export", "bfloat16"))
    for threads in sorted(counts):  # rising, so that no thread of PyTorch's is there yet when ONNX Runtime has its turn
        torch.set_num_threads(threads)
        predict = in_onnx(onnx, threads)
        first, then = taken(predict, scale), taken(own, scale)
        for batch in ROUNDS:
            title = f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
            if batch > 1:
                title += f" (busier experts get {100 * busier(predict['routed, ONNX'], drawn(batch, scale)):.0f} %)"
            yield compared("export", title, "seconds", first[batch] | then[batch], ratios(batch))


def main() -> None:
    """Measure, print the ratios and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--width", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scale = Scale(arguments.width)
    models = networks(scale)
    evened(models["routed"], drawn(64, scale))
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as folder:
        for one in measured(models, scale, Path(folder), arguments.threads):
            found.append(one)
            print(*one.rows, sep="\n", flush=True)
    if arguments.out is not None:
        write_found(arguments.out, found)


if __name__ == "__main__":
    main()

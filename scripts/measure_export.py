"""Is the exported network as fast as its cost says? ONNX Runtime's time of routed, small dense and dense ResNet-18 (r 0.5, N 2)
beside each other and beside PyTorch's, all taking turns in one run; batch 64 and 1.

    python scripts/measure_export.py --threads 2 --out results/export.json

Weights and pictures are random. The routers choose for themselves, their biases set so that either expert gets half of the
pictures, the hardest case; what the busier expert gets is told. PyTorch runs what `advmoe benchmark` does: batch norms folded in,
channels last, inference mode.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from advmoe.benchmark import Scale, variants
from advmoe.benchmark.rows import Found, Ratio, compared, write_found
from advmoe.benchmark.timing import timed
from advmoe.export import Predictor, export, onnx_predictor
from advmoe.models import Classifier

CPU = torch.device("cpu")
ROUNDS = {64: 15, 1: 200}
TARGETS = {64: ">= 2.5", 1: ">= 2.0"}
KINDS = {"routed": "MoE", "small dense": "small dense", "dense": "dense"}


def networks(scale: Scale) -> dict[str, Classifier]:
    """One of each kind, from one seed."""
    made = {}
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        made[name] = variants.network(kind, "resnet18", scale, CPU)
    return made


def drawn(count: int, scale: Scale) -> Tensor:
    """Random pictures, the same ones each time."""
    return torch.rand(count, *variants.spec(scale.side).shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def evened(model: Classifier, pixels: Tensor) -> None:
    """Set each router's bias, layer by layer, so that half of the pictures choose either expert."""
    for place, layer in enumerate(model.moe_layers()):
        assert layer.router is not None
        logits = model.forward_routed(pixels)[1][place].logits
        layer.router.linear.bias[0] -= (logits[:, 0] - logits[:, 1]).quantile(0.5)


def files(models: dict[str, Classifier], scale: Scale, folder: Path, threads: int) -> dict[str, Predictor]:
    """Each network as an ONNX file, in ONNX Runtime."""
    for name, model in models.items():
        export(model, variants.spec(scale.side).shape, folder / f"{name}.onnx")
    return {name: onnx_predictor(folder / f"{name}.onnx", threads) for name in models}


def in_torch(model: Classifier, pixels: Tensor) -> Tensor:
    """A forward pass of the network as it is used."""
    with torch.inference_mode():
        logits: Tensor = model(pixels)
        return logits


def busier(predict: Predictor, pixels: Tensor) -> float:
    """The mean over layers of the share that a layer's busier expert gets."""
    ones = predict(pixels)[1].double().mean(dim=0)
    return torch.maximum(ones, 1 - ones).mean().item()


def calls(models: dict[str, Classifier], predict: dict[str, Predictor], pixels: Tensor) -> dict[str, Callable[[], object]]:
    """The networks' passes over the same pictures, ONNX Runtime's first."""
    laid_out = pixels.contiguous(memory_format=torch.channels_last)
    own = {f"{name}, PyTorch": partial(in_torch, variants.twin(model), laid_out) for name, model in models.items()}
    return {**{f"{name}, ONNX": partial(run, pixels) for name, run in predict.items()}, **own}


def ratios(batch: int) -> Iterator[Ratio]:
    """What is asked of them."""
    yield "dense, ONNX", "routed, ONNX", TARGETS[batch]
    yield "dense, ONNX", "small dense, ONNX", None
    yield "dense, PyTorch", "routed, PyTorch", None
    yield "dense, PyTorch", "small dense, PyTorch", None
    for name in KINDS:
        yield f"{name}, PyTorch", f"{name}, ONNX", None


def main() -> None:
    """Measure, print the ratios and keep them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scale = Scale(arguments.width)
    models = networks(scale)
    evened(models["routed"], drawn(64, scale))
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as folder:
        predict = files(models, scale, Path(folder), arguments.threads)
        for batch, rounds in ROUNDS.items():
            pixels = drawn(batch, scale)
            title = f"ResNet-18, batch {batch}, {arguments.threads} threads"
            if batch > 1:
                title += f" (busier experts get {100 * busier(predict['routed'], pixels):.0f} %)"
            measured = timed(calls(models, predict, pixels), rounds, CPU)
            found.append(compared("export", title, "seconds", measured, ratios(batch)))
            print(*found[-1].rows, sep="\n", flush=True)
    if arguments.out is not None:
        write_found(arguments.out, found)


if __name__ == "__main__":
    main()

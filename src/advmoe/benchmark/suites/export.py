"""Is the exported network as fast as its cost suggests? About 10 minutes.

The time of routed, small dense and dense ResNet-18 (r 0.5, N 2) in ONNX Runtime, in PyTorch, and in files of torch.export, with
float32 convolutions and lower precisions; batches of 64 and 1, one thread and two.

The variants of ONNX Runtime run in turn, then those of PyTorch. They are not mixed, because the threads of each library stay busy
for a while after their work and would slow down the other. Weights and images are random. The routers choose, with biases that
give each expert half of the images; this is the hardest case. The rows say which share the busier expert really gets. "PyTorch" is
the network that the inference suite runs.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from advmoe.benchmark import variants
from advmoe.benchmark.rows import Ratio, Row, compare
from advmoe.benchmark.setup import Scale, Setup
from advmoe.benchmark.timing import timed
from advmoe.export import FORMATS, Dtype, Encoding, Predictor, export, onnx_predictor
from advmoe.export.onnx import check_extra
from advmoe.models import Classifier, deployed
from advmoe.wording import number_of

CPU = torch.device("cpu")
ROUNDS = {64: 15, 1: 200}
THREADS = (1, 2)
TARGETS = {64: ">= 2.5", 1: ">= 2.0"}
KINDS = {"routed": "MoE", "small dense": "small dense", "dense": "dense"}
LOWER = ("routed", "dense")  # also measured with convolutions in lower precision
Calls = Mapping[str, Callable[[Tensor], object]]


def check(_: Setup) -> None:
    """Raises UserError if ONNX Runtime is not installed."""
    check_extra()


def measure(setup: Setup) -> Iterator[Row]:
    """The times and ratios with each number of threads."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    models = networks(setup.scale)
    even_out(models["routed"], random_images(64, setup.scale))
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield from with_threads(models, setup, Path(folder))
    finally:
        torch.set_num_threads(usual)


def with_threads(models: Mapping[str, Classifier], setup: Setup, folder: Path) -> Iterator[Row]:
    """The ratios with one thread, then with more, so that PyTorch has no other threads yet while ONNX Runtime runs."""
    onnx = write(models, setup.scale, folder, "onnx", "int8")
    in_torch = torch_calls(models, write(models, setup.scale, folder, "torch-export", "bfloat16"))
    for threads in THREADS:
        torch.set_num_threads(threads)
        predict = {f"{name}, ONNX": onnx_predictor(path, threads) for name, path in onnx.items()}
        first, then = time_batches(predict, setup), time_batches(in_torch, setup)
        for batch in ROUNDS:
            case = f"batch {batch}, {number_of(threads, 'thread')}"
            if batch > 1:
                case += (
                    f" (busier experts get {100 * busier_share(predict['routed, ONNX'], random_images(batch, setup.scale)):.0f} %)"
                )
            yield from compare("export", case, "s", first[batch] | then[batch], ratios(batch))


def networks(scale: Scale) -> dict[str, Classifier]:
    """One network of each kind, from the same seed."""
    models = {}
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        models[name] = variants.network(kind, "resnet18", scale, CPU)
    return models


def random_images(count: int, scale: Scale) -> Tensor:
    """Random images; each call returns the same ones."""
    return torch.rand(count, *variants.spec(scale.side).shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def even_out(model: Classifier, pixels: Tensor) -> None:
    """Set the bias of each router, layer by layer, so that each expert gets half of the images."""
    for number, layer in enumerate(model.moe_layers()):
        assert layer.router is not None
        logits = model.forward_routed(pixels)[1][number].logits
        layer.router.linear.bias[0] -= (logits[:, 0] - logits[:, 1]).quantile(0.5)


def write(models: Mapping[str, Classifier], scale: Scale, folder: Path, form: str, lower: Dtype) -> dict[str, Path]:
    """Files in one format: of each network, and of those in LOWER also with the dtype `lower`."""
    dtypes: dict[str, tuple[str, Dtype]] = {name: (name, "float32") for name in models}
    dtypes |= {f"{name} {lower}": (name, lower) for name in LOWER}
    files = {}
    for title, (name, dtype) in dtypes.items():
        files[title] = folder / f"{title}.{form}"
        shape, encoding = variants.spec(scale.side).shape, Encoding(form, dtype)
        export(models[name], shape, files[title], encoding=encoding, calibration=random_images(256, scale))
    return files


def torch_calls(models: Mapping[str, Classifier], files: Mapping[str, Path]) -> Calls:
    """Forward passes of the deployed networks, and of their torch.export files."""
    networks = {name: partial(predict, deployed(model), torch.channels_last) for name, model in models.items()}
    load = FORMATS["torch-export"].predictor
    exported = {f"{name}, torch.export": partial(predict, load(path), torch.contiguous_format) for name, path in files.items()}
    return {f"{name}, PyTorch": call for name, call in networks.items()} | exported


def predict(model: Callable[[Tensor], object], layout: torch.memory_format, pixels: Tensor) -> object:
    """A forward pass."""
    with torch.inference_mode():
        return model(pixels.contiguous(memory_format=layout))


def busier_share(predict: Predictor, pixels: Tensor) -> float:
    """The share of the images that a layer's busier expert gets, averaged over layers."""
    ones = predict(pixels)[1].double().mean(dim=0)
    return torch.maximum(ones, 1 - ones).mean().item()


def time_batches(calls: Calls, setup: Setup) -> dict[int, dict[str, list[float]]]:
    """The seconds of each call at each batch size. The calls run in turn."""
    seconds = {}
    for batch, rounds in ROUNDS.items():
        pixels = random_images(batch, setup.scale)
        seconds[batch] = timed({name: partial(call, pixels) for name, call in calls.items()}, setup.rounds(rounds), CPU)
    return seconds


def ratios(batch: int) -> Iterator[Ratio]:
    """The ratios to report."""
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

"""How lower precision changes exported networks: accuracy, routes, file size, and robust accuracy. Minutes for each run.

    advmoe train --recipe demo-advmoe --out runs/demo     (and others: --backbone vgg16_bn --epochs 4, ...)
    advmoe benchmark --suite low_precision --runs runs/demo ... --json low_precision.json

Every run is exported as float32, bfloat16 (torch-export) and int8 (ONNX) and compared with PyTorch. The first run is also attacked
with the quick preset, in two ways: adversarial images of the float32 network are run through the file, and the file is attacked
directly. The file decides whether an image fools it. Gradients and gates other than `hard` come from the network in PyTorch: in
bfloat16 under autocast, or in float32 for int8 (straight-through).
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from advmoe.benchmark.rows import Row
from advmoe.benchmark.setup import Setup
from advmoe.data import load_dataset
from advmoe.errors import UserError
from advmoe.evaluation import Evaluation, evaluate
from advmoe.evaluation.wrappers import LowPrecision
from advmoe.export import Dtype, Encoding, Outputs, Predictor, agreement, calibration_images, export, outputs
from advmoe.export.onnx import check_extra
from advmoe.models import fused
from advmoe.moe import HARD, Gate, Routings
from advmoe.runs.load import load
from advmoe.runs.loaded import Loaded

IMAGES, ATTACKED = 1000, 400
BATCH = 64
ENCODINGS = (Encoding("onnx", "float32"), Encoding("torch-export", "bfloat16"), Encoding("onnx", "int8"))


def check(setup: Setup) -> None:
    """Raises UserError if no runs are given, or if ONNX Runtime is not installed."""
    if not setup.runs:
        raise UserError("suite low_precision measures trained networks: give --runs RUN ...")
    check_extra()


def measure(setup: Setup) -> Iterator[Row]:
    """The rows of every run. The first run is also attacked."""
    images, attacked = (40, 10) if setup.quick else (IMAGES, ATTACKED)
    for number, run in enumerate(setup.runs):
        yield from rows(run, images, attacked if number == 0 else 0)


class Deployed(nn.Module):
    """A file under attack: the logits of the file with the gradient of the PyTorch network. Gates other than `hard` run PyTorch."""

    def __init__(self, predict: Predictor, network: Any) -> None:
        super().__init__()
        self.predict = partial(predict)  # not a submodule: an exported module has no training mode
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        with torch.no_grad():
            logits_of_file = self.predict(x.detach())[0]
        if not torch.is_grad_enabled():
            return logits_of_file
        logits: Tensor = self.network(x)
        return logits + (logits_of_file - logits).detach()

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Routings]:
        """Logits [B, classes] and routings of the PyTorch network."""
        logits, routings = self.network.forward_routed(x, gate)
        return logits, routings


@dataclass(frozen=True, eq=False)
class Case:
    """The network of a run, test images [n, C, H, W] with labels [n], and the calibration images for int8."""

    model: Loaded
    pixels: Tensor
    labels: Tensor
    calibration: Tensor

    def first(self, count: int) -> "Case":
        """The same with only the first `count` test images."""
        return replace(self, pixels=self.pixels[:count], labels=self.labels[:count])

    def evaluated(self, network: nn.Module, store: Path | None = None) -> Evaluation:
        """The quick preset's Evaluation of a network. `store` keeps the adversarial images."""
        epsilon = self.model.threat_model.epsilon
        return evaluate(
            network, self.pixels, self.labels, epsilon=epsilon, preset="quick", store=store, save_adversarial=store is not None
        )


def load_case(run: Path, count: int) -> Case:
    """A run with `count` test images, balanced over the classes."""
    model = load(run)
    data = load_dataset(model.config.data.replace(limit_test=count))
    return Case(model, data.test.pixels(), data.test.labels, calibration_images(data))


def adversarial_images(store: Path) -> list[tuple[Tensor, Tensor]]:
    """The adversarial images in the store of an evaluation: rows [m] and images [m, C, H, W], for each attack and shard."""
    files = (load_file(path) for path in sorted((store / "adversarial").iterdir()))
    return [(file["rows"], file["x_adv"]) for file in files]


def fooled(predict: Predictor, pixels: Tensor, labels: Tensor) -> Tensor:
    """Which images [B, C, H, W] a file misclassifies: [B] bool."""
    logits = torch.cat([predict(chunk)[0] for chunk in pixels.split(BATCH)])
    return logits.argmax(dim=1) != labels


def broken_by(predict: Predictor, case: Case, adversarial: Sequence[tuple[Tensor, Tensor]]) -> set[int]:
    """The rows with an adversarial image that fools the file."""
    rows: set[int] = set()
    for numbers, x_adv in adversarial:
        rows |= set(numbers[fooled(predict, x_adv, case.labels[numbers])].tolist())
    return rows


def robust_accuracy(case: Case, predict: Predictor, dtype: Dtype, adversarial: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The worst case (quick) of a file in percent: for float32's adversarial images, for attacks on the file, and for both."""
    network = fused(case.model.network)
    evaluation = case.evaluated(Deployed(predict, LowPrecision(network) if dtype == "bfloat16" else network).eval())
    correct = set((~fooled(predict, case.pixels, case.labels)).nonzero()[:, 0].tolist())
    broken = {"RA: transferred": broken_by(predict, case, adversarial), "RA: attacked itself": set(evaluation.ever)}
    broken["RA: both"] = set().union(*broken.values())
    return {name: 100 * len(correct - rows) / len(case.labels) for name, rows in broken.items()}


def accuracies(case: Case, encoding: Encoding, path: Path, reference: Outputs) -> tuple[Predictor, dict[str, float | None]]:
    """The function that runs a file, and the accuracies of the file and of PyTorch in percent."""
    predict = export(case.model.network, case.model.input_size, path, encoding=encoding, calibration=case.calibration)
    same = agreement(reference, predict, case.pixels, case.labels, BATCH)
    sa = 100 - 100 * fooled(predict, case.pixels, case.labels).double().mean().item()
    return predict, {"SA": sa, "same class": same.classes, "same route": same.routes}


def rows(run: Path, count: int, attacked: int) -> Iterator[Row]:
    """All rows of one run, on `count` test images, of which the first `attacked` are attacked."""
    full = load_case(run, count)
    few = full.first(attacked)
    config, reference = full.model.config, outputs(full.model.network, full.pixels)
    title = f"{config.model.backbone}, {config.method}, width {config.model.width}, {config.training.epochs} epochs"
    with tempfile.TemporaryDirectory() as folder:
        adversarial, exact = [], None
        if attacked:
            exact = few.evaluated(full.model.network, Path(folder, "store"))
            adversarial = adversarial_images(Path(folder, "store"))
        for encoding in ENCODINGS:
            dtype, path = encoding.dtype, Path(folder, encoding.dtype)
            predict, figures = accuracies(full, encoding, path, reference)
            if exact is not None:
                figures |= {"RA: both": exact.worst} if dtype == "float32" else robust_accuracy(few, predict, dtype, adversarial)
            case = f"{title}, {encoding.format} {dtype}"
            for what, value in figures.items():
                if value is not None:
                    yield Row(suite="low_precision", case=case, what=what, value=value, unit="%")
            yield Row(suite="low_precision", case=case, what="size", value=path.stat().st_size, unit="bytes")

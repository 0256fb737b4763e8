"""What a lower precision does to exported networks: accuracy, routes, file size, and what they withstand.

    advmoe train --recipe demo-advmoe --out runs/demo     (and others: --backbone vgg16_bn --epochs 4, ...)
    python scripts/measure_low_precision.py runs/demo ... --out results/low_precision.json

Every run is exported as float32, bfloat16 (torch-export) and int8 (ONNX) and compared with PyTorch. The first is attacked, too, by
the quick preset: images found against float32 are given to the file; and the file is attacked itself. It says what counts, its
PyTorch twin (bfloat16 under autocast, float32 for int8: straight-through) lends gradients and other gates.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from advmoe.cli.export import CALIBRATION
from advmoe.data import load_dataset
from advmoe.data.images import balanced
from advmoe.evaluation import evaluate
from advmoe.evaluation.record import provenance
from advmoe.evaluation.search import LowPrecision
from advmoe.export import Answers, Dtype, Predictor, agreement, answers, export
from advmoe.files import write_json
from advmoe.models import fused
from advmoe.moe import HARD, Gate, Routings
from advmoe.runs.load import Loaded, load

BATCH = 64
FORMS: dict[Dtype, str] = {"float32": "onnx", "bfloat16": "torch-export", "int8": "onnx"}


class Deployed(nn.Module):
    """A file under attack: its answers, with the gradient of its twin in PyTorch. Under any gate that is asked for, the twin."""

    def __init__(self, predict: Predictor, twin: Any) -> None:
        super().__init__()
        self.predict = partial(predict)  # so that it is no part of this one: an exported module knows no mode
        self.twin = twin

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        with torch.no_grad():
            said = self.predict(x.detach())[0]
        if not torch.is_grad_enabled():
            return said
        logits: Tensor = self.twin(x)
        return logits + (said - logits).detach()

    def forward_routed(self, x: Tensor, gate: Gate = HARD) -> tuple[Tensor, Routings]:
        """The twin's."""
        found: tuple[Tensor, Routings] = self.twin.forward_routed(x, gate)
        return found


@dataclass(frozen=True, eq=False)
class Case:
    """A run's network, test images [n, C, H, W] with labels [n], and images to calibrate on."""

    model: Loaded
    pixels: Tensor
    labels: Tensor
    calibration: Tensor

    def first(self, count: int) -> "Case":
        """The same with fewer test images."""
        return replace(self, pixels=self.pixels[:count], labels=self.labels[:count])

    def evaluated(self, network: nn.Module, store: Path | None = None) -> Any:
        """The quick preset's Evaluation of a network; with a store, which keeps the adversarial images."""
        epsilon = self.model.threat_model.epsilon
        return evaluate(
            network, self.pixels, self.labels, epsilon=epsilon, preset="quick", store=store, save_adversarial=store is not None
        )


def case(run: Path, count: int) -> Case:
    """What is measured of a run: `count` test images, balanced over the classes."""
    model = load(run)
    data = load_dataset(replace(model.config.data, limit_test=count))
    calibration = data.train.subset(balanced(data.train.labels, CALIBRATION)).pixels()
    return Case(model, data.test.pixels(), data.test.labels, calibration)


def found_against(store: Path) -> list[tuple[Tensor, Tensor]]:
    """Adversarial images that an evaluation kept: rows [m] and images [m, C, H, W], for each attack and shard."""
    files = (load_file(path) for path in sorted((store / "adversarial").iterdir()))
    return [(file["rows"], file["x_adv"]) for file in files]


def wrong(predict: Predictor, pixels: Tensor, labels: Tensor) -> Tensor:
    """Which images a file takes for something else: [B] bool."""
    logits = torch.cat([predict(chunk)[0] for chunk in pixels.split(BATCH)])
    return logits.argmax(dim=1) != labels


def broken_by(predict: Predictor, own: Case, found: Sequence[tuple[Tensor, Tensor]]) -> set[int]:
    """Rows of which any of the images fools the file."""
    rows: set[int] = set()
    for numbers, x_adv in found:
        rows |= set(numbers[wrong(predict, x_adv, own.labels[numbers])].tolist())
    return rows


def withstood(own: Case, predict: Predictor, dtype: Dtype, found: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """RA-worst (quick) of a file in percent: under float32's images, under attacks on itself, under both."""
    twin = fused(own.model.network)
    evaluation = own.evaluated(Deployed(predict, LowPrecision(twin) if dtype == "bfloat16" else twin).eval())
    right = set((~wrong(predict, own.pixels, own.labels)).nonzero()[:, 0].tolist())
    broken = {"transfer": broken_by(predict, own, found), "white_box": set(evaluation.ever)}
    broken["both"] = broken["transfer"] | broken["white_box"]
    return {f"ra_{name}": 100 * len(right - rows) / len(own.labels) for name, rows in broken.items()}


def measured(own: Case, dtype: Dtype, folder: Path, known: Answers) -> tuple[Predictor, dict[str, Any]]:
    """A file, and what it says beside what is known; percent."""
    path, form = folder / dtype, FORMS[dtype]
    predict = export(own.model.network, own.model.input_size, path, form, None, dtype, own.calibration)
    same = agreement(known, predict, own.pixels, own.labels, BATCH)
    sa = 100 - 100 * wrong(predict, own.pixels, own.labels).double().mean().item()
    return predict, {"format": form, "bytes": path.stat().st_size, "sa": sa, "classes": same.classes, "routes": same.routes}


def row(run: Path, count: int, attacked: int) -> dict[str, Any]:
    """Everything about one run, on `count` test images, of which the first `attacked` are attacked."""
    own = case(run, count)
    few = own.first(attacked)
    config, known = own.model.config, answers(own.model.network, own.pixels)
    files: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder, found = Path(place), []
        exact = few.evaluated(own.model.network, folder / "store") if attacked else None
        if exact is not None:
            found = found_against(folder / "store")
        for dtype in FORMS:
            predict, files[dtype] = measured(own, dtype, folder, known)
            if exact is not None:
                files[dtype] |= {"ra_both": exact.worst} if dtype == "float32" else withstood(few, predict, dtype, found)
            print(run, dtype, files[dtype], flush=True)
    shown = {"method": config.method, "backbone": config.model.backbone, "width": config.model.width}
    data = {"dataset": config.data.dataset, "epsilon": own.model.threat_model.epsilon, "images": len(own.labels)}
    data["attacked"] = min(attacked, count)
    return {**shown, **data, "epochs": config.training.epochs, "files": files}


def main() -> None:
    """Measure all runs; keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--attacked", type=int, default=400)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [row(run, arguments.images, 0 if place else arguments.attacked) for place, run in enumerate(arguments.runs)]
    if arguments.out is not None:
        write_json(arguments.out, {"calibration": CALIBRATION, "runs": rows, **provenance()}, indent=1)


if __name__ == "__main__":
    main()

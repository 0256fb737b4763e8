"""A short real run of every method, and of every backbone, on a few hundred CIFAR-10 images: trained, evaluated, recorded.

    python scripts/short_runs.py DIR [--width 16]

DIR holds CIFAR-10. It shows that every cell runs from data to Record; so short a training says nothing of the methods.
Runs lie in runs/short (nothing is run twice); the Records go to results/short.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
METHODS = ("standard", "at_dense", "at_small_dense", "at_sparse", "at_moe", "advmoe")
BACKBONES = {"wrn28_10": 20, "vgg16_bn": 16, "densenet40": 12}
SIZE = ("--limit-train", "600", "--limit-test", "100", "--epochs", "3", "--batch-size", "60", "--lr", "0.05")


def short_run(recipe: str, data: str, width: int) -> dict[str, object]:
    """Train, evaluate (quick) and give the Record."""
    run, advmoe = ROOT / "runs/short" / recipe, [sys.executable, "-m", "advmoe"]
    train = [*advmoe, "train", "--recipe", recipe, "--data-dir", data, "--width", str(width), *SIZE, "--out", str(run), "--resume"]
    subprocess.run(train, check=True, stdout=subprocess.DEVNULL)
    if not (run / "record.json").exists():
        subprocess.run([*advmoe, "evaluate", str(run), "--quick"], check=True, stdout=subprocess.DEVNULL)
    record: dict[str, object] = json.loads((run / "record.json").read_text())
    return record


def main() -> None:
    """Run what is missing; print a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--width", type=int, default=16)
    arguments = parser.parse_args()
    cells = {f"cifar10-resnet18-{method}": arguments.width for method in METHODS}
    cells |= {f"cifar10-{backbone}-advmoe": width for backbone, width in BACKBONES.items()}
    records = {recipe: short_run(recipe, arguments.data, width) for recipe, width in cells.items()}
    (ROOT / "results/short.json").write_text(json.dumps(list(records.values()), indent=1) + "\n")
    for recipe, record in records.items():
        print(f"| `{recipe}` | {record['sa']:.0f} | {record['ra_worst_quick']:.0f} | {record['gmacs']:.4f} |")


if __name__ == "__main__":
    main()

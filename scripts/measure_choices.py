"""Measure one choice at small scale: train the demo's network with each value of a field, evaluate, keep the Records.

    python scripts/measure_choices.py tied_share 0 0.67 --seeds 2

Runs lie in runs/choices (nothing is run twice); the Records go to results/choices/FIELD.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def measure(field: str, value: str, seed: int) -> dict[str, object]:
    """The Record of one run, quick preset."""
    run = ROOT / "runs/choices" / f"{field}-{value}-{seed}"
    advmoe = [sys.executable, "-m", "advmoe"]
    flag = f"--{field.replace('_', '-')}"
    train = [*advmoe, "train", "--recipe", "demo-advmoe", flag, value, "--seed", str(seed), "--out", str(run), "--resume"]
    subprocess.run(train, check=True)
    found = subprocess.run([*advmoe, "evaluate", str(run), "--quick", "--json"], check=True, stdout=subprocess.PIPE, text=True)
    record: dict[str, object] = json.loads(found.stdout)
    return record


def main() -> None:
    """Measure all values and seeds; print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("field")
    parser.add_argument("values", nargs="+")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    records = [measure(arguments.field, value, seed) for value in arguments.values for seed in range(arguments.seeds)]
    target = ROOT / "results/choices" / f"{arguments.field}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(records, indent=1) + "\n")
    for record in records:
        value = record["config"]["training"].get(arguments.field)  # type: ignore[index]
        worst = record["ra_worst_quick"]
        print(f"{arguments.field} {value}  seed {record['seed']}  SA {record['sa']:.1f}  RA-worst (quick) {worst:.1f}")


if __name__ == "__main__":
    main()

"""Measure choices at small scale: train the demo's network with each set of flags, evaluate, keep the Records.

    python scripts/measure_choices.py norms "--tied-share 0" "--tied-share 0 --norms per_expert" --seeds 2

Runs lie in runs/choices (nothing is run twice, whatever the name); the Records go to results/choices/NAME.json.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[1]


def measure(flags: str, seed: int) -> dict[str, object]:
    """The Record of one run, quick preset."""
    run = ROOT / "runs/choices" / f"{'_'.join(flags.replace('-', ' ').split())}_{seed}"
    advmoe = [sys.executable, "-m", "advmoe"]
    train = [*advmoe, "train", "--recipe", "demo-advmoe", *shlex.split(flags), "--seed", str(seed), "--out", str(run), "--resume"]
    subprocess.run(train, check=True, stdout=subprocess.DEVNULL)
    record = run / "record.json"
    if not record.exists():
        subprocess.run([*advmoe, "evaluate", str(run), "--quick"], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, object] = json.loads(record.read_text())
    return found


def line(flags: str, records: list[dict[str, object]]) -> str:
    """SA and RA-worst (quick), mean and sample deviation over the seeds."""
    cells = []
    for name in ("sa", "ra_worst_quick"):
        values = [float(str(record[name])) for record in records]
        cells.append(f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else ""))
    return f"| `{flags}` | {len(records)} | {' | '.join(cells)} |"


def main() -> None:
    """Measure all sets of flags and seeds; print a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("flags", nargs="+")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    found = {flags: [measure(flags, seed) for seed in range(arguments.seeds)] for flags in arguments.flags}
    target = ROOT / "results/choices" / f"{arguments.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps([record for records in found.values() for record in records], indent=1) + "\n")
    for flags, records in found.items():
        print(line(flags, records))


if __name__ == "__main__":
    main()

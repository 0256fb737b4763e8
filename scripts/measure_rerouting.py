"""Measure what routing hides: naively trained networks with one hard router, PGD-50 and AutoAttack against rerouting.

    python scripts/measure_rerouting.py

Trains the networks that the tests plant (four small CNNs behind a hard router, epsilon 0.1, three seeds) and writes
results/rerouting.json.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "evaluation"))

from planted import EPSILON, images, planted  # noqa: E402

from advmoe.evaluation import evaluate  # noqa: E402
from advmoe.evaluation.record import provenance  # noqa: E402

SEEDS = 3
IMAGES = 64


def main() -> None:
    """One evaluation a seed; print what each attack left."""
    test, results = images().test, []
    x, y = test.pixels()[:IMAGES], test.labels[:IMAGES]
    for seed in range(SEEDS):
        found = evaluate(planted(seed), x, y, epsilon=EPSILON, preset=["pgd_50", "autoattack", "reroute"], seed=seed).to_dict()
        results.append({"seed": seed, **found})
        print(f"seed {seed}: " + "  ".join(f"{name} {found[name]:.1f}" for name in ("sa", "ra_50", "ra_aa", "ra_worst")))
    target = ROOT / "results/rerouting.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"results": results, **provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()

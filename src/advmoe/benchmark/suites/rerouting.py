"""Hard routing hides weaknesses: networks with one hard router under PGD-50 and AutoAttack, then under rerouting. About 3 minutes.

Each network has four small CNNs and one router. It is trained on the embedded images with plain PGD (epsilon 0.1), once for each of
three seeds.
"""

from collections.abc import Iterator

from advmoe.benchmark.planted import EPSILON, images, planted
from advmoe.benchmark.rows import Row
from advmoe.benchmark.setup import Setup
from advmoe.evaluation import evaluate

SEEDS, IMAGES = 3, 64
PRESET = ["pgd_50", "autoattack", "reroute"]
FIGURES = ("sa", "ra_50", "ra_aa", "ra_worst")


def measure(setup: Setup) -> Iterator[Row]:
    """For each seed: the accuracies of an evaluation, and how many of its images each attack broke."""
    test = images().test
    count = 8 if setup.quick else IMAGES
    x, y = test.pixels()[:count], test.labels[:count]
    settings = {"epochs": 1, "count": 200} if setup.quick else {}
    for seed in range(1 if setup.quick else SEEDS):
        case = f"seed {seed}, {count} images"
        result = evaluate(planted(seed, **settings), x, y, epsilon=EPSILON, preset=PRESET, seed=seed).to_dict()
        for figure in FIGURES:
            spread = tuple(result["intervals"][figure])
            yield Row(suite="rerouting", case=case, what=figure, value=result["figures"][figure], unit="%", spread=spread)
        for name, attack in result["attacks"].items():
            what = f"broken by {name}, of {attack['attacked']}"
            yield Row(suite="rerouting", case=case, what=what, value=attack["broken"], unit="count")

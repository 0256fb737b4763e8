"""What hard routing hides: networks behind one hard router, under PGD-50 and AutoAttack, then under rerouting. About 3 minutes.

Each network is four small CNNs behind one router, trained naively on embedded images (epsilon 0.1), one for each of three seeds.
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
    """Accuracies, and the images that each attack broke among those it was given, of one evaluation a seed."""
    test = images().test
    count = 8 if setup.quick else IMAGES
    x, y = test.pixels()[:count], test.labels[:count]
    settings = {"epochs": 1, "count": 200} if setup.quick else {}
    for seed in range(1 if setup.quick else SEEDS):
        case = f"seed {seed}, {count} images"
        found = evaluate(planted(seed, **settings), x, y, epsilon=EPSILON, preset=PRESET, seed=seed).to_dict()
        for figure in FIGURES:
            spread = tuple(found["intervals"][figure])
            yield Row(suite="rerouting", case=case, what=figure, value=found["figures"][figure], unit="%", spread=spread)
        for name, attack in found["attacks"].items():
            what = f"broken by {name}, of {attack['attacked']}"
            yield Row(suite="rerouting", case=case, what=what, value=attack["broken"], unit="count")

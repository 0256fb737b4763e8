"""A trained network to a Record."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from advmoe.attacks import Pgd
from advmoe.config import RunConfig
from advmoe.data import Splits
from advmoe.evaluation.accuracy import Progress, accuracy, correct_flags, evaluation_step, robust_flags
from advmoe.evaluation.cost import Cost, cost
from advmoe.evaluation.record import make_record
from advmoe.models import Classifier

STEPS = (10, 20, 50)
Stage = Callable[[str, int], AbstractContextManager[Progress]]


@contextmanager
def silent(name: str, total: int) -> Iterator[Progress]:
    """A stage that tells nobody."""
    yield lambda pictures: None


def evaluate(
    model: Classifier, config: RunConfig, splits: Splits, dense: Cost, *, epoch: int, train_seconds: float,
    seed: int = 0, batch_size: int = 128, stage: Stage = silent,
) -> dict[str, Any]:  # fmt: skip
    """SA, and RA under PGD with 10, 20 and 50 steps, each over every correctly classified test picture.

    `model` and `splits` lie on one device; `dense` is the cost of the dense network to compare with.
    """
    started, epsilon = time.perf_counter(), config.attack.epsilon
    clean = correct_flags(model, splits.test)
    ra = {}
    for steps in STEPS:
        with stage(f"PGD-{steps}", int(clean.sum())) as progress:
            settings = Pgd(epsilon, evaluation_step(epsilon), steps)
            flags = robust_flags(model, splits.test, settings, seed=seed, batch_size=batch_size, progress=progress)
        ra[str(steps)] = accuracy(flags)
    return make_record(
        config, splits, epoch=epoch, sa=accuracy(clean), ra=ra, network=cost(model, splits.spec.shape), dense=dense,
        train_seconds=train_seconds, evaluate_seconds=time.perf_counter() - started, attack_seed=seed,
    )  # fmt: skip

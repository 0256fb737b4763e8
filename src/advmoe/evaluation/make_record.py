"""Evaluate a network on its test images, and create the Record."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from advmoe.config import RunConfig, to_dict
from advmoe.data import Splits
from advmoe.errors import UserError
from advmoe.evaluation.cost import Cost, cost
from advmoe.evaluation.record import HistoryRow, Record, RecordedCode, RecordedTeacher
from advmoe.evaluation.record_config import RecordedConfig
from advmoe.evaluation.results import Evaluation
from advmoe.evaluation.runner import evaluate_claimed
from advmoe.evaluation.snapshot import Snapshot, snapshot
from advmoe.evaluation.target import EvaluationOptions
from advmoe.models import Classifier
from advmoe.models.digest import weights_digest
from advmoe.provenance import code, provenance


@dataclass(frozen=True)
class Trained:
    """The run that trained a network: configuration, name of the folder, evaluated epoch, the rows of all epochs with the wall time
    of their iterations, the digest of the teacher's weights, and the code that trained it. `train_images` is the number of
    training images where the data of the evaluation do not include them."""

    config: RunConfig
    run: str
    epoch: int
    history: Sequence[HistoryRow] = ()
    train_seconds: float = 0.0
    teacher: str | None = None
    train_images: int | None = None
    trained_by: Sequence[RecordedCode] = ()


@dataclass(frozen=True)
class Measured:
    """The results measured on a network, and the `seconds` that it took. `cost` is the cost of the network, `dense` that of the
    dense network, and `weights` the digest of the network."""

    evaluation: Evaluation
    snapshot: Snapshot
    cost: Cost
    dense: Cost
    weights: str
    seconds: float


def make_record(trained: Trained, splits: Splits, options: EvaluationOptions, measured: Measured) -> Record:
    """The Record of a network that was evaluated with `options` on the test part of `splits`."""
    config, evaluation, cost, dense = trained.config, measured.evaluation, measured.cost, measured.dense
    return Record(
        run=trained.run,
        method=config.method,
        backbone=config.model.backbone,
        dataset=splits.name,
        sa=evaluation.sa,
        ra={name.removeprefix("ra_"): value for name, value in evaluation.figures.items() if name[3:].isdigit()},
        ra_aa=evaluation.figures.get("ra_aa"),
        ra_aa_plus=evaluation.figures.get("ra_aa_plus"),
        ra_aa_rand=evaluation.figures.get("ra_aa_rand"),
        ra_worst=evaluation.worst if evaluation.complete else None,
        ra_worst_quick=None if evaluation.complete else evaluation.worst,
        epsilon=options.epsilon,
        norm=options.norm,
        gmacs=cost.gmacs_ideal,
        gmacs_executed=cost.gmacs_executed,
        gmacs_dense=dense.gmacs_ideal,
        reduction=100 * (1 - cost.gmacs_ideal / dense.gmacs_ideal),
        params=cost.params,
        epoch=trained.epoch,
        train_images=len(splits.train) if trained.train_images is None else trained.train_images,
        test_images=len(splits.test),
        fingerprint=splits.fingerprint,
        weights=measured.weights,
        teacher=_teacher(trained),
        trained_by=list(trained.trained_by) or None,
        seed=config.seed,
        attack_seed=options.seed,
        attack_precision="bfloat16" if options.bf16_search else "float32",
        config=RecordedConfig.model_validate(to_dict(config.replace(data=config.data.replace(data_dir=None)))),
        train_seconds=trained.train_seconds,
        # a continued evaluation measures the seconds since it was continued; those of the attacks are complete, over all processes
        evaluate_seconds=max(measured.seconds, sum(attack.seconds for attack in evaluation.attacks.values())),
        evaluation=evaluation.result(),
        history=list(trained.history),
        classes=list(splits.spec.classes),
        **measured.snapshot._asdict(),
        **provenance().model_dump(),
    )


def code_of(rows: Iterable[Mapping[str, Any]]) -> list[RecordedCode]:
    """The code that trained the epochs of these rows of a history, in order; empty if no row says it."""
    codes = [RecordedCode(advmoe=row.get("advmoe"), commit=row.get("commit")) for row in rows]
    return [code for code, _ in groupby(codes)] if any(code.advmoe for code in codes) else []


def _teacher(trained: Trained) -> RecordedTeacher | None:
    path, digest = trained.config.training.teacher, trained.teacher
    return None if path is None or digest is None else RecordedTeacher(path=path, weights=digest)


def evaluate_run(model: Classifier, trained: Trained, splits: Splits, dense: Cost, options: EvaluationOptions) -> Record:
    """Run `evaluate` on the test part, and return the Record. `dense` is the cost of the dense network.

    The caller has claimed the store, if there is one (`advmoe.evaluation.claim`). Raises UserError for a part of the shards.
    """
    if options.part != (0, 1):
        raise UserError("a Record is of all shards: evaluate the parts first, then leave out part")
    code()  # before the attacks, because the Record names the code that ran them
    started, x, y = time.perf_counter(), splits.test.pixels(), splits.test.labels
    evaluation = evaluate_claimed(model, x, y, options)
    test_snapshot = snapshot(model, x, y, evaluation.correct, options)
    network, weights = cost(model, splits.spec.shape), weights_digest(model)
    measured = Measured(evaluation, test_snapshot, network, dense, weights, time.perf_counter() - started)
    return make_record(trained, splits, options, measured)

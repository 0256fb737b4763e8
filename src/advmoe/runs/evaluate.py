"""Evaluate a trained network: the best epoch in a run's folder, or a saved one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from advmoe.config import RunConfig
from advmoe.config.choices import Dispatch
from advmoe.data import ImageSpec, Splits
from advmoe.errors import UserError
from advmoe.evaluation.claim import claimed
from advmoe.evaluation.make_record import Trained, code_of, evaluate_run
from advmoe.evaluation.record import HistoryRow, Record
from advmoe.evaluation.record_file import RECORD, read_record
from advmoe.evaluation.runner import check_attacks, evaluate_claimed, warn_before
from advmoe.evaluation.store import STORE
from advmoe.evaluation.target import EvaluationOptions
from advmoe.models import Classifier
from advmoe.runs.cost import dense_cost
from advmoe.runs.load import FILE, load
from advmoe.training.checkpoint import RunFolder
from advmoe.training.saved import check_registered, spec_from_data
from advmoe.training.start import best_network


@dataclass(frozen=True)
class Subject:
    """A trained network to evaluate. `network` returns it in eval mode, without masked weights, on the data's device; `spec`
    returns the format of its images.

    Shards are kept in `store`, the Record in `record_path`. `fingerprint` is that of the training data, None if it is not known.
    `damaged` names checkpoints that were skipped.
    """

    trained: Trained
    fingerprint: str | None
    network: Callable[[RunConfig, Splits], Classifier]
    spec: Callable[[], ImageSpec]
    store: Path
    record_path: Path
    damaged: tuple[str, ...] = ()

    def on_test_set(self) -> "Subject":
        """The same network to be evaluated on another test set. If the number of training images is not known, it is that of the
        network's present Record; without a Record it is 0."""
        if self.trained.train_images is not None:
            return self
        recorded = read_record(self.record_path).train_images if self.record_path.is_file() else 0
        return replace(self, trained=replace(self.trained, train_images=recorded))

    def named(self, name: str) -> "Subject":
        """The same network to be evaluated with a separate store and Record, which have `name` in their names."""
        return replace(
            self, store=self.store.with_name(f"{self.store.name}-{name}"),
            record_path=self.record_path.with_name(f"{self.record_path.name.removesuffix(RECORD)}{name}.{RECORD}"),
        )  # fmt: skip

    def check(self, splits: Splits, what: Path, where: str) -> None:
        """Raises UserError if the data in `where` is not what the network `what` was trained on, as far as is known."""
        if self.fingerprint not in (None, splits.fingerprint):
            raise UserError(f"{where}: fingerprint {splits.fingerprint}, but {what} was trained on {self.fingerprint}")

    def check_attacks(self, config: RunConfig, splits: Splits, options: EvaluationOptions) -> None:
        """Raises UserError if no attack of the options can run on the network."""
        first = splits.test[torch.zeros(1, dtype=torch.int64, device=splits.test.labels.device)]
        check_attacks(self.network(config, splits), first.pixels(), first.labels, options)

    def evaluate(self, config: RunConfig, splits: Splits, options: EvaluationOptions, dispatch: Dispatch = "auto") -> Record:
        """The Record of the network on the test part of `splits`. `config` is its configuration, changed where the evaluation
        differs from the training. The caller has claimed the store (`advmoe.evaluation.claim`). Raises what
        `advmoe.evaluation.evaluate` raises."""
        trained, model = replace(self.trained, config=config), self._dispatched(config, splits, dispatch)
        return evaluate_run(model, trained, splits, dense_cost(config, splits.spec), replace(options, store=self.store))

    def evaluate_part(self, config: RunConfig, splits: Splits, options: EvaluationOptions, dispatch: Dispatch = "auto") -> None:
        """Attack only the shards of `options.part`. `evaluate` finds their results in the store."""
        model = self._dispatched(config, splits, dispatch)
        evaluate_claimed(model, splits.test.pixels(), splits.test.labels, replace(options, store=self.store))

    def warn_before(self, config: RunConfig, splits: Splits, options: EvaluationOptions, dispatch: Dispatch = "auto") -> None:
        """The warnings of `evaluate` before its attacks, for a caller that leaves the attacks to other processes."""
        model = self._dispatched(config, splits, dispatch)
        warn_before(model, splits.test.pixels(), splits.test.labels, replace(options, store=self.store))

    def _dispatched(self, config: RunConfig, splits: Splits, dispatch: Dispatch) -> Classifier:
        model = self.network(config, splits)
        model.set_dispatch(dispatch)
        return model


def find_subject(what: Path) -> Subject:
    """The network in a run's folder (its best epoch), in a file that `advmoe.save_file` wrote, in the package, or on the hub.

    Raises UserError if there is none.
    """
    if not what.is_dir() or (what / FILE).is_file():
        return _saved(what)
    folder = RunFolder(what)
    config, best = folder.config(), folder.best()
    check_registered(config, what)
    history = [HistoryRow.model_validate(row) for row in best.history]
    teacher = next((row["teacher"] for row in best.history if "teacher" in row), None)
    code = code_of(best.history[: best.epoch])
    trained = Trained(config, what.resolve().name, best.epoch, history, best.train_seconds, teacher, trained_by=code)
    return Subject(
        trained, best.fingerprint, lambda config, splits: best_network(best, config, splits),
        lambda: best.spec or spec_from_data(what, config), what / STORE, what / RECORD, tuple(folder.damaged()),
    )  # fmt: skip


def _saved(what: Path) -> Subject:
    """A saved network, with what its Record says of its training. The new Record lies beside the file, or in the working folder if
    the network comes from the package or the hub."""
    loaded = load(what)
    beside = what / FILE if what.is_dir() else what if what.exists() else Path(f"{what.name}.safetensors")

    def network(config: RunConfig, splits: Splits) -> Classifier:
        if (splits.spec.classes, splits.spec.shape) != (loaded.classes, loaded.input_size):
            raise UserError(f"{what}: is for other classes or image sizes than the data set {splits.name} has")
        return loaded.network.to(splits.test.labels.device).eval()

    trained, record = Trained(loaded.config, beside.stem, loaded.epoch), loaded.record
    if record is not None:
        teacher = None if record.teacher is None else record.teacher.weights
        trained = replace(
            trained, history=record.history, train_seconds=record.train_seconds, teacher=teacher, train_images=record.train_images,
            trained_by=record.trained_by or [],
        )  # fmt: skip
    return Subject(
        trained, None if record is None else record.fingerprint, network, lambda: loaded.spec,
        beside.with_name(f"{beside.stem}.evaluation"), beside.with_name(f"{beside.stem}.{RECORD}"),
    )  # fmt: skip


def evaluate_folder(
    run: Path, config: RunConfig, splits: Splits, options: EvaluationOptions, *, dispatch: Dispatch = "auto"
) -> Record:
    """The Record of the best epoch of the run in a folder, evaluated on the test part of `splits`.

    `config` is the run's, changed where the evaluation differs from the training. Results are kept in RUN/evaluation. Raises
    UserError if the folder holds no complete checkpoint, and what `advmoe.evaluation.evaluate` raises.
    """
    subject = find_subject(run)
    with claimed(subject.store, options.part):
        return subject.evaluate(config, splits, options, dispatch)

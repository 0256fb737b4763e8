"""Evaluate the network in a run's folder."""

from dataclasses import replace
from pathlib import Path

from advmoe.config import RunConfig
from advmoe.data import Splits
from advmoe.evaluation.make_record import Trained, evaluate_run
from advmoe.evaluation.record import Record
from advmoe.evaluation.target import EvaluationOptions
from advmoe.moe import Dispatch
from advmoe.runs.cost import dense_cost
from advmoe.training.checkpoint import RunFolder
from advmoe.training.start import best_network


def evaluate_folder(
    run: Path, config: RunConfig, splits: Splits, options: EvaluationOptions, *, dispatch: Dispatch = "auto"
) -> Record:
    """The Record of the best epoch of the run in a folder, evaluated on the test part of `splits`.

    `config` is the run's, changed where the evaluation differs from the training. Results are kept in RUN/evaluation. Raises
    UserError where the folder holds no complete checkpoint, and what `advmoe.evaluation.evaluate` raises.
    """
    model, epoch = best_network(run, config, splits)
    model.set_dispatch(dispatch)
    dense = dense_cost(config, splits.spec)
    trained = Trained(config, run.resolve().name, epoch, RunFolder(run).best().history)
    return evaluate_run(model, trained, splits, dense, replace(options, store=run / "evaluation"))

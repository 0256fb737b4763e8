"""`advmoe demo`: four methods and a control on embedded images, a table, and a report."""

import shlex
from pathlib import Path

from rich.console import Console

from advmoe.cli.arguments.demo import DemoArguments
from advmoe.cli.device import set_up_device
from advmoe.cli.display import EvaluationProgress, TrainingProgress
from advmoe.cli.streams import console
from advmoe.config import RunConfig
from advmoe.data import Splits, load_dataset
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_file import RECORD, write_record
from advmoe.evaluation.store import shard_count
from advmoe.evaluation.target import EvaluationOptions
from advmoe.files import write_json
from advmoe.recipes import recipe
from advmoe.reports.answers import answers
from advmoe.reports.tables import record_table
from advmoe.reports.write import write_report
from advmoe.runs.evaluate import evaluate_folder
from advmoe.training.loop import train

RECIPES = ("standard", "at_dense", "at_small_dense", "at_moe-n1", "advmoe")  # in the order of reports


def run(arguments: DemoArguments) -> None:
    """Train and evaluate the demo's `RECIPES` in folders in --out, and write the report. Runs that an earlier call finished are not
    repeated."""
    terminal = console()
    out, torch_device = arguments.out, set_up_device(arguments.runtime)
    configs = {name: recipe(f"demo-{name}").replace(runtime=arguments.runtime, seed=arguments.seed) for name in RECIPES}
    splits = load_dataset(configs["advmoe"].data).to(torch_device)
    records = []
    for name, config in configs.items():
        with TrainingProgress(terminal, name, config.training.epochs) as progress:
            train(config, splits, out / name, progress, resume=(out / name).exists())
        records.append(_evaluate(out / name, config, splits, terminal))
    write_json(out / "records.json", [record.to_json() for record in records], indent=1)
    statements = answers(records)
    write_report(records, out, statements)
    epsilon = configs["advmoe"].attack.epsilon
    terminal.print(record_table(records, f"{splits.name}, {len(splits.test)} test images, L-infinity epsilon {epsilon:g}"))
    lines = [
        *map(str, statements),
        f"More attacks: advmoe evaluate {shlex.quote(str(out / 'advmoe'))} --standard",
        f"The report: {(out / 'report.html').absolute()}",
    ]
    terminal.print(*lines, sep="\n", soft_wrap=True)


def _evaluate(run: Path, config: RunConfig, splits: Splits, console: Console) -> Record:
    with EvaluationProgress(console, config.method, shard_count(len(splits.test))) as progress:
        options = EvaluationOptions(config.attack.epsilon, preset="quick", progress=progress.attacked)
        record = evaluate_folder(run, config, splits, options, dispatch=config.runtime.dispatch)
    write_record(run / RECORD, record)
    return record

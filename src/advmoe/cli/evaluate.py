"""`advmoe evaluate`."""

import contextlib
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console

from advmoe import distributed, extension
from advmoe.attacks.presets import resolve
from advmoe.cli.arguments.evaluate import EvaluateArguments, EvaluateCommand
from advmoe.cli.device import find_device, set_up_device
from advmoe.cli.display import EvaluationProgress
from advmoe.cli.streams import console
from advmoe.config import RunConfig
from advmoe.config.choices import PATHWAY_BUDGET
from advmoe.data import Splits, load_dataset
from advmoe.data.test_set import ExtraTestSet
from advmoe.errors import UserError
from advmoe.evaluation.claim import Part, claimed
from advmoe.evaluation.record import Record
from advmoe.evaluation.record_file import check_not_newer, gallery_path, read_record, write_record
from advmoe.evaluation.robustbench import model_info
from advmoe.evaluation.store import remove_results, shard_count
from advmoe.evaluation.target import EvaluationOptions
from advmoe.files import JsonObject, check_folder, check_target, json_object, write_json
from advmoe.models import Classifier
from advmoe.parent import end_with_parent
from advmoe.provenance import code
from advmoe.reports.control import comparison_line, worst_case_difference
from advmoe.reports.tables import check_lines, evaluation_lines, record_table
from advmoe.runs.evaluate import Subject, find_subject
from advmoe.runs.load import load
from advmoe.training.precision import autocast_dtype

logger = logging.getLogger("advmoe")
WORKER = "ADVMOE_WORKER"  # this environment variable marks the processes that --processes starts


def run(arguments: EvaluateCommand) -> None:
    if WORKER in os.environ:
        end_with_parent()
    else:
        _check_used(arguments)
    _check_attacks(arguments)
    with distributed.process_group(set_up_device(arguments.runtime)):
        if distributed.world_size() > 1 and (arguments.part is not None or arguments.processes > 1):
            raise UserError("torchrun already shares the shards between its processes; leave out --part and --processes")
        _evaluate(arguments)


def _check_used(arguments: EvaluateCommand) -> None:
    """Raises UserError for flags that need a Record, which --part does not write. Workers inherit them."""
    flags = {
        "robustbench": arguments.robustbench is not None, "control": arguments.control is not None,
        "keep-images": arguments.keep_images, "json": arguments.json,
    }  # fmt: skip
    unused = next((name for name, given in flags.items() if given), None)
    if arguments.part is not None and unused is not None:
        raise UserError(f"--part excludes --{unused}, which is for the same command without --part, after all parts")


def _check_attacks(arguments: EvaluateCommand) -> None:
    """Raises UserError, before --fresh deletes anything, if an attack is unknown, or if a flag is for an attack that is not run."""
    attacks = resolve(arguments.preset).attacks
    for flag, name, given in (
        ("transfer", "transfer", arguments.transfer is not None),
        ("pathway-budget", "paths", arguments.pathway_budget not in (0, PATHWAY_BUDGET)),
    ):
        if given and name not in attacks:
            raise UserError(
                f"--{flag} is for the attack {name}, which is not run: --standard and --full have it, or add it to --attacks"
            )


def _evaluate(arguments: EvaluateCommand) -> None:
    code()  # now, because the Record names the code that runs the attacks, here and in worker processes
    subject, config, splits = _trained(arguments.run, arguments)
    distributed.on_rank_zero(lambda: _check_writable(subject, arguments))
    transfer = _transfer(arguments, splits)
    control = None if arguments.control is None else _control(arguments.control, arguments, config, splits)
    with _claimed(subject.store, arguments.part or (0, 1)):
        record = _record(arguments, subject, config, splits, transfer)
        if record is None:
            return
        write_record(subject.record_path, record, arguments.keep_images)
    if arguments.robustbench is not None:
        write_json(arguments.robustbench, model_info(record), indent=2)
    if arguments.json:
        content = (record if arguments.keep_images else record.without_images()).to_json()
        print(json.dumps(content if control is None else {**content, "control": _compared(record, control)}))
        return
    title = f"{splits.name}, {len(splits.test)} test images, {arguments.norm} epsilon {record.epsilon:.4g}"
    terminal = console()
    terminal.print(record_table([record], title))
    terminal.print(*evaluation_lines(record), *check_lines(record.evaluation), sep="\n", soft_wrap=True)
    if control is not None:
        terminal.print(comparison_line(record, control), soft_wrap=True)


def _epsilon(arguments: EvaluateCommand, config: RunConfig) -> float:
    return config.attack.epsilon if arguments.epsilon is None else arguments.epsilon


def _compared(record: Record, control: Record) -> JsonObject:
    """The comparison with the control, for --json. There is no difference if they cannot be compared; the text says why."""
    difference = worst_case_difference([(record, control)])
    return {
        "run": control.run, "difference": difference and difference.model_dump(), "text": comparison_line(record, control)
    }  # fmt: skip


def _check_writable(subject: Subject, arguments: EvaluateCommand) -> None:
    """Raises UserError if the files of this evaluation could not be written in the end, or would replace a Record of a newer
    version. A part of the shards writes no Record."""
    if arguments.part is None:
        check_target(subject.record_path, "the Record")
        check_not_newer(json_object(subject.record_path) or {}, str(subject.record_path))
    else:
        check_folder(subject.store, "the results")
    if arguments.robustbench is not None:
        others = (path for path in (arguments.transfer, arguments.control, arguments.test_set) if path is not None)
        files = (subject.record_path, gallery_path(subject.record_path))
        check_target(arguments.robustbench, "the RobustBench file", arguments.run, *files, *others)


@contextlib.contextmanager
def _claimed(store: Path, part: Part) -> Iterator[None]:
    """Claim the shards during the block. Rank 0 claims for all ranks, and a process with --processes for its workers."""
    if WORKER in os.environ:
        yield
        return
    with contextlib.ExitStack() as stack:
        distributed.on_rank_zero(lambda: stack.enter_context(claimed(store, part)))
        yield


def _record(
    arguments: EvaluateCommand, subject: Subject, config: RunConfig, splits: Splits, transfer: Classifier | None
) -> Record | None:
    """The Record of the evaluation; None for a part of the shards, and on the ranks above 0."""
    store = subject.store
    shards = shard_count(len(splits.test), arguments.shard_size)
    with EvaluationProgress(Console(stderr=True, quiet=distributed.rank() > 0), config.method, shards, log=True) as progress:
        options = EvaluationOptions(
            _epsilon(arguments, config), arguments.norm, arguments.preset,
            arguments.seed, arguments.shard_size, transfer=transfer,
            bf16_search=autocast_dtype(arguments.runtime.precision, splits.test.labels.device) is not None,
            save_adversarial=arguments.save_adversarial, progress=progress.attacked, batch_size=arguments.batch_size,
            pathway_budget=arguments.pathway_budget,
        )  # fmt: skip
        if arguments.fresh:
            subject.check_attacks(config, splits, options)  # before anything is deleted
            distributed.on_rank_zero(lambda: remove_results(store))
        progress.stored(store)
        dispatch = arguments.runtime.dispatch
        if arguments.processes > 1:
            subject.warn_before(config, splits, options, dispatch)  # the workers' own warnings are not shown
            _evaluate_in_workers(arguments, lambda: progress.stored(store))
        if distributed.world_size() > 1:
            part = distributed.rank(), distributed.world_size()
            subject.evaluate_part(config, splits, replace(options, part=part), dispatch)
        distributed.barrier()
        if distributed.rank() > 0:
            return None
        if arguments.part is not None:
            subject.evaluate_part(config, splits, replace(options, part=arguments.part), dispatch)
            return None
        warned = arguments.processes > 1 or distributed.world_size() > 1
        return subject.evaluate(config, splits, replace(options, quiet=warned), dispatch)


def _trained(run: Path, arguments: EvaluateArguments) -> tuple[Subject, RunConfig, Splits]:
    """A trained network, its configuration with the data of this evaluation, and that data. Raises UserError if it was trained on
    other data."""
    subject, torch_device = _subject(run, arguments), find_device(arguments.runtime)
    config = subject.trained.config
    data = config.data.replace(data_dir=arguments.data_dir or config.data.data_dir)
    data = data.replace(limit_test=arguments.limit_test or config.data.limit_test)
    for name in subject.damaged:
        logger.warning("%s: checkpoint %s is cut short or altered; epoch %d is evaluated", run, name, subject.trained.epoch)
    if (test_set := _test_set(arguments)) is not None:
        return subject, config.replace(data=data), test_set.load(subject.spec(), data).to(torch_device)
    splits = load_dataset(data).to(torch_device)
    subject.check(splits, run, data.data_dir or data.dataset)
    return subject, config.replace(data=data), splits


def _subject(run: Path, arguments: EvaluateArguments) -> Subject:
    """A trained network, to be evaluated on the test set of these arguments. A --name, or else the name of another test set, is
    part of the names of its results."""
    test_set, subject = _test_set(arguments), find_subject(run)
    if test_set is not None:
        return subject.on_test_set().named(arguments.name or test_set.name)
    return subject.named(arguments.name) if arguments.name else subject


def _test_set(arguments: EvaluateArguments) -> ExtraTestSet | None:
    if arguments.test_set is None:
        return None
    return ExtraTestSet(arguments.test_set, arguments.corruption, 1 if arguments.severity is None else arguments.severity)


def _transfer(arguments: EvaluateArguments, splits: Splits) -> Classifier | None:
    """The network to transfer attacks from, if any. Raises UserError if it was trained on other data."""
    if arguments.transfer is None:
        return None
    source, config, transfer_splits = _trained(arguments.transfer, arguments)
    if (transfer_splits.fingerprint, transfer_splits.spec.classes) != (splits.fingerprint, splits.spec.classes):
        raise UserError(f"{arguments.transfer}: was trained on other data than {arguments.run}; its attacks cannot be transferred")
    model = source.network(config, transfer_splits)
    model.set_dispatch(arguments.runtime.dispatch)
    return model


def _control(run: Path, arguments: EvaluateCommand, config: RunConfig, splits: Splits) -> Record:
    """The Record of another run for the same test set and --name. Raises UserError if there is none, or if it is for other images
    or another threat model."""
    path = _subject(run, arguments).record_path
    record = read_record(path) if path.exists() else None
    if record is None and arguments.name is None and arguments.test_set is None:
        record = load(run).record  # of a file, the package or the hub
    if record is not None:
        epsilon = _epsilon(arguments, config)
        if (record.epsilon, record.norm) != (epsilon, arguments.norm):
            theirs, ours = f"{record.norm} epsilon {record.epsilon:.4g}", f"{arguments.norm} epsilon {epsilon:.4g}"
            raise UserError(f"{run}: was evaluated with {theirs}, not {ours}: not a control for this run")
        if (record.fingerprint, record.test_images) != (splits.fingerprint, len(splits.test)):
            raise UserError(f"{run}: was evaluated on other test images: not a control for this run")
        return record
    names = ("name", "test_set", "corruption", "severity")
    given = [(f"--{name.replace('_', '-')}", str(value)) for name in names if (value := getattr(arguments, name)) is not None]
    command = f"{extension.command()} {shlex.join(['evaluate', str(run), *chain(*given)])}"
    raise UserError(f"{run}: is not evaluated yet (no {path.name}); run {command} first")


def _evaluate_in_workers(arguments: EvaluateCommand, refresh: Callable[[], None]) -> None:
    """Evaluate the shards in worker processes, which write to the run's folder. `refresh` is called twice a second."""
    argv = [argument for argument in arguments.argv if argument != "--fresh"]
    end = argv.index("--") if "--" in argv else len(argv)  # what follows is no flag
    count, devices = arguments.processes, torch.cuda.device_count()
    threads = arguments.runtime.threads or max(1, torch.get_num_threads() // count)
    command = [sys.executable, "-m", "advmoe", "evaluate", *argv[:end], "--processes", "1", "--threads", str(threads)]
    environment = {**os.environ, WORKER: "1"}
    with contextlib.ExitStack() as stack:
        workers = []
        for number in range(count):
            divided = devices > 1 and arguments.runtime.device in ("auto", "cuda")
            cuda = ["--device", f"cuda:{number % devices}"] if divided else []
            part = ["--part", str(number), str(count)]
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = stack.enter_context(
                subprocess.Popen(
                    [*command, *part, *cuda, *argv[end:]],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env=environment,
                )
            )
            stack.callback(process.terminate)  # so that they stop with this process; no effect on finished ones
            workers.append((process, errors))
        codes: list[int | None] = [None]
        while None in codes and not any(codes):  # the first worker that fails ends the others, whose results are kept
            refresh()
            time.sleep(0.5)
            codes = [process.poll() for process, _ in workers]
        for process, errors in workers:
            if process.returncode:
                errors.seek(0)
                lines = errors.read().strip().splitlines()
                if process.returncode < 0 or not lines:  # the last line is not an error then, but perhaps progress
                    raise UserError("a worker process was killed, perhaps because memory ran out")
                raise UserError(lines[-1].removeprefix("advmoe: error: "))

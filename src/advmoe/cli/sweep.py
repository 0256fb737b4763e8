"""`advmoe sweep`."""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path

import tyro
from rich.console import Console

from advmoe.attacks.presets import resolve
from advmoe.cli.parsing import Flag, console, device, parse
from advmoe.config import RuntimeConfig
from advmoe.errors import UserError
from advmoe.evaluation.record_file import read_record
from advmoe.files import write_json
from advmoe.runs.cost import image_spec
from advmoe.runs.status import LOG, RunStatus, State, read_run
from advmoe.sweep.estimate import UNKNOWN, Probe, Sizes, evaluation_seconds, same_but_seed, sizes, timings, training_seconds
from advmoe.sweep.folder import PROBE, check_free, keep_plan
from advmoe.sweep.grid import MOST_SEEDS, Settings, SweepFile, read_sweep
from advmoe.sweep.job import Job, preset_or_attacks
from advmoe.sweep.placements import Placement, PlacementName, Request, placement_class
from advmoe.sweep.plan import Planned, plan
from advmoe.sweep.schedule import Outcome, deadline, drive
from advmoe.sweep.show import Board, Statuses, counts, plan_table, remaining

FAILED, WORK_LEFT = 1, 75  # exit statuses; 75 is EX_TEMPFAIL of sysexits.h, "try again"


@dataclass(frozen=True)
class SweepArguments:
    """Train and evaluate every run of one of the paper's tables or figures, or of a sweep file.

    No work is done twice: after a stop or a kill, the same command goes on where it was. With --minutes it ends with status 75
    while work remains, so that it can be called again and again.
    """

    what: tyro.conf.Positional[str]
    """a1, a2, fig7, figA2, or a sweep file (FILE.yaml; docs/paper.md says what it holds)."""
    out: Path
    """Folder for the runs: one folder each, NAME-sSEED."""
    minutes: float | None = None
    """End within this time, with status 75 if work remains."""
    records: Path | None = None
    """When all runs are done, write their Records to this JSON file, without the galleries' test images."""
    keep_images: Flag = False
    """Keep the test images in the file of --records."""
    seeds: int | None = None
    """Number of runs of each cell, with seeds from 0; by default the file's, or 3."""
    dry_run: Flag = False
    """Print the plan and write nothing."""
    only: tuple[str, ...] = ()
    """Only the runs whose name contains every one of these texts (resnet18, advmoe, r0.5, s0)."""
    epochs: int | None = None
    """Epochs per phase, instead of the recipes'."""
    limit_train: int | None = None
    """Train on this many images, balanced over the classes."""
    limit_test: int | None = None
    """Attack this many test images, balanced over the classes."""
    dataset: str | None = None
    """Data set, instead of the grid's."""
    width: int | None = None
    """Channels of the dense networks' first stage."""
    batch_size: int | None = None
    """Images per batch."""
    data_dir: str | None = None
    """File or folder that holds the data."""
    preset: tuple[str, ...] = ()
    """What runs are evaluated with: quick, standard, full, or names of attacks; by default the file's, or quick."""
    placement: PlacementName = "local"
    """Where runs run: processes on this machine, tasks of a Ray cluster, jobs of Slurm (extras ray and slurm)."""
    workers: int | None = None
    """Runs at once; by default one for each CUDA device, or up to four on the CPU (Slurm: no limit)."""
    address: str | None = None
    """Ray: address of a running cluster, or auto. Slurm: submitit's executor, local or debug without Slurm."""
    slurm: tuple[str, ...] = ()
    """Slurm: submitit's parameters as KEY=VALUE (slurm_partition=gpu gpus_per_node=1 timeout_min=600)."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        for name in ("seeds", "workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.seeds is not None and self.seeds > MOST_SEEDS:
            raise UserError(f"seeds must be at most {MOST_SEEDS}, not {self.seeds}")
        if self.minutes is not None and not 0 < self.minutes < inf:
            raise UserError(f"minutes must be positive and finite, not {self.minutes}")
        if self.address is not None and self.placement == "local":
            raise UserError("--address is for --placement ray or slurm")
        if self.slurm and self.placement != "slurm":
            raise UserError("--slurm is for --placement slurm")
        if self.records is not None and not self.records.absolute().parent.is_dir():
            raise UserError(f"{self.records.parent}: no such folder for the Records")

    @property
    def settings(self) -> Settings:
        """What the command line sets in every run's configuration."""
        given: dict[str, dict[str, int | str | None]] = {
            "training": {"epochs": self.epochs, "batch_size": self.batch_size},
            "model": {"width": self.width},
            "data": {"limit_train": self.limit_train, "limit_test": self.limit_test, "data_dir": self.data_dir},
        }
        return {section: {name: v for name, v in fields.items() if v is not None} for section, fields in given.items()}


@dataclass(frozen=True)
class Sweep:
    """The command at work: its arguments, its runs, and when it must end."""

    arguments: SweepArguments
    runs: Sequence[Planned]
    preset: tuple[str, ...]
    terminal: Console
    until: float

    def folder(self, run: Planned) -> Path:
        return self.arguments.out / run.name

    def status(self, name: str) -> RunStatus:
        return read_run(self.arguments.out / name, resolve(preset_or_attacks(self.preset)).attacks)

    def statuses(self) -> Statuses:
        return {run.name: self.status(run.name) for run in self.runs}


def run(words: list[str]) -> None:
    """`advmoe sweep`. Raises SystemExit with status 1 if a run failed, and 75 if the time was up."""
    started = time.monotonic()
    arguments = parse(SweepArguments, "sweep", words)
    file = read_sweep(arguments.what)
    sweep = Sweep(
        arguments, _planned(arguments, file), _preset(arguments, file), console(), deadline(started, arguments.minutes)
    )  # fmt: skip
    for planned in sweep.runs:
        check_free(sweep.folder(planned), planned.config)
    statuses = sweep.statuses()
    missing = [planned for planned in sweep.runs if statuses[planned.name].state is not State.DONE]
    with contextlib.ExitStack() as stack:
        placement = _placement(arguments, len(missing)) if missing else None
        if placement is not None:
            stack.enter_context(contextlib.closing(placement))
        seconds, reason = _prepared(sweep, missing, statuses, placement)
        sweep.terminal.print(plan_table(sweep.runs, statuses, seconds))
        _print(sweep, remaining(len(sweep.runs), len(missing), seconds, placement, reason))
        if placement is not None and not arguments.dry_run:
            _run_missing(sweep, missing, placement)
    if arguments.records is not None and not arguments.dry_run:
        records = [read_record(sweep.folder(planned) / "record.json") for planned in sweep.runs]
        kept = [record if arguments.keep_images else record.without_images() for record in records]
        write_json(arguments.records, [record.to_json() for record in kept], indent=1)
        _print(sweep, f"{len(records)} Records: {arguments.records}")


def _print(sweep: Sweep, text: str) -> None:
    sweep.terminal.print(text, highlight=False, markup=False, soft_wrap=True)


def _planned(arguments: SweepArguments, file: SweepFile) -> list[Planned]:
    runs = plan(file, arguments.only, arguments.dataset, arguments.settings, arguments.seeds)
    return [replace(planned, config=planned.config.replace(runtime=arguments.runtime)) for planned in runs]


def _preset(arguments: SweepArguments, file: SweepFile) -> tuple[str, ...]:
    """Raises UserError if it names an unknown attack."""
    preset = arguments.preset or file.preset
    resolve(preset_or_attacks(preset))
    return preset


def _placement(arguments: SweepArguments, runs: int) -> Placement | None:
    """Where the runs go; a dry run asks no cluster. Raises UserError if the placement cannot do what is asked."""
    runtime = arguments.runtime
    if arguments.placement == "local":
        device(runtime.replace(threads=0))
    request = Request(
        runs, arguments.out, arguments.workers, runtime.threads, runtime.device, arguments.address, arguments.slurm
    )  # fmt: skip
    kind = placement_class(arguments.placement)
    kind.check(request)
    return None if arguments.dry_run and arguments.placement != "local" else kind(request)


def _prepared(
    sweep: Sweep, missing: Sequence[Planned], statuses: Statuses, placement: Placement | None
) -> tuple[Mapping[str, float], str]:
    """Read the data, write the plan, and estimate the seconds of the missing runs. A dry run without the data has no estimate,
    and a reason instead."""
    try:
        known = sizes([planned.config.data for planned in missing])
    except UserError as error:
        if not sweep.arguments.dry_run:
            raise
        return {}, str(error)
    if missing and not sweep.arguments.dry_run:
        keep_plan(sweep.arguments.out, sweep.arguments.what, sweep.runs, sweep.preset)
    return _seconds(sweep, missing, known, statuses, placement), ""


def _seconds(
    sweep: Sweep, missing: Sequence[Planned], known: Sizes, statuses: Statuses, placement: Placement | None
) -> dict[str, float]:  # fmt: skip
    arguments, preset, estimates = sweep.arguments, preset_or_attacks(sweep.preset), {}
    runtime = arguments.runtime.replace(threads=arguments.runtime.threads if placement is None else placement.threads)
    if arguments.placement != "local":  # a cluster's machines may have what this one lacks
        runtime = runtime.replace(device="auto", dispatch="auto")
    earlier = timings([sweep.folder(planned) for planned in sweep.runs], preset)
    with sweep.terminal.status("probing") as status:
        kept, again = None if arguments.dry_run else arguments.out / PROBE, arguments.minutes is None
        probe = Probe(device(runtime), kept, lambda what: status.update(f"probing {what}"), again)
        for planned in missing:
            config, counted = planned.config.replace(runtime=runtime), known[planned.config.data]
            pace, past = probe.pace(config, image_spec(config)), earlier.get(same_but_seed(config), UNKNOWN)
            training = training_seconds(config, counted, pace, statuses[planned.name].epoch, past)
            evaluation = evaluation_seconds(config, counted, pace, preset) if past.evaluation is None else past.evaluation
            estimates[planned.name] = training + evaluation
    return estimates


def _run_missing(sweep: Sweep, missing: Sequence[Planned], placement: Placement) -> None:
    """Run what is missing. Raises SystemExit if a run failed, or the time was up."""
    jobs = [Job(sweep.folder(planned), planned.config, sweep.preset) for planned in missing]
    before = {job.name: sweep.status(job.name).progress for job in jobs}
    with Board(sweep.terminal, sweep.arguments.out, [planned.name for planned in sweep.runs], sweep.status) as board:
        outcome = drive(placement, jobs, board.look, sweep.until)
    _print(sweep, f"{sweep.arguments.out}: {counts(sweep.statuses())}")
    _end(sweep, jobs, outcome, any(sweep.status(name).progress > progress for name, progress in before.items()))


def _end(sweep: Sweep, jobs: Sequence[Job], outcome: Outcome, progressed: bool) -> None:
    """Name what failed and what remains. Raises SystemExit if anything does."""
    for name, line in outcome.failed.items():
        print(f"{name}: {line} (see {sweep.arguments.out / name / LOG})", file=sys.stderr)
    if outcome.failed:
        some = f"{len(outcome.failed)} of {len(jobs)} runs failed: {', '.join(outcome.failed)}"
        print(f"advmoe: error: {some}; the same command tries again", file=sys.stderr)
    if outcome.remaining and progressed:
        print(f"{len(outcome.remaining)} runs remain; the same command goes on", file=sys.stderr)
        raise SystemExit(WORK_LEFT)
    if outcome.remaining and not outcome.failed:
        print("advmoe: error: no step of training and no attack was finished; give more --minutes", file=sys.stderr)
    if outcome.remaining or outcome.failed:
        raise SystemExit(FAILED)

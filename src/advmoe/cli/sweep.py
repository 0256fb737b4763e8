"""`advmoe sweep`."""

import contextlib
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.text import Text

from advmoe.attacks.presets import preset_or_attacks, resolve
from advmoe.cli.arguments.sweep import SweepArguments
from advmoe.cli.device import find_device, set_up_device
from advmoe.cli.streams import console
from advmoe.errors import UserError
from advmoe.files import check_folder
from advmoe.runs.cost import image_spec
from advmoe.runs.status import LOG, RunStatus, read_run
from advmoe.sweep.estimate import UNKNOWN, Probe, Sizes, evaluation_seconds, same_but_seed, sizes, timings, training_seconds
from advmoe.sweep.grid import read_sweep
from advmoe.sweep.job import Job
from advmoe.sweep.placements import Placement, Request, placement_class
from advmoe.sweep.plan import Planned, plan
from advmoe.sweep.records import check_records, write_records
from advmoe.sweep.schedule import SweepOutcome, deadline, drive
from advmoe.sweep.show import Board, Statuses, counts, plan_table, remaining
from advmoe.training.checkpoint import RunFolder
from advmoe.training.interrupts import Stopped
from advmoe.wording import number_of

PROBE = ".probe.json"  # in the folder of the sweep: the times of networks
PROBE_SHARE = 0.25  # of the time until the jobs must end
FAILED, WORK_LEFT = 1, 75  # exit statuses; 75 is EX_TEMPFAIL ("try again") of sysexits.h


@dataclass(frozen=True)
class Sweep:
    """One call of the command: arguments, runs, attacks, console, and the times (of time.monotonic) at which the jobs and the
    probing must end."""

    arguments: SweepArguments
    runs: Sequence[Planned]
    preset: tuple[str, ...]
    terminal: Console
    until: float
    probe_until: float

    def folder(self, run: Planned) -> Path:
        return self.arguments.out / run.name

    def status(self, name: str) -> RunStatus:
        return read_run(self.arguments.out / name, resolve(preset_or_attacks(self.preset)).attacks)

    def statuses(self) -> Statuses:
        return {run.name: self.status(run.name) for run in self.runs}


def run(arguments: SweepArguments) -> None:
    """`advmoe sweep`. SIGTERM ends it like Ctrl-C. Raises SystemExit with status 1 if a run failed, and 75 if the time is up and
    runs remain."""
    started = time.monotonic()
    file = read_sweep(arguments.what)
    until = deadline(started, arguments.minutes)
    probe_until = started + PROBE_SHARE * (until - started)
    runs = plan(file, arguments.only, arguments.dataset, arguments.settings, arguments.seeds)
    runs = [replace(planned, config=planned.config.replace(runtime=arguments.runtime)) for planned in runs]
    preset = arguments.preset or file.preset
    resolve(preset_or_attacks(preset))  # an unknown name is refused before anything is written
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"{arguments.out}: is a file; --out takes a folder")
    check_folder(arguments.out, "the runs")
    sweep = Sweep(arguments, runs, preset, console(), until, probe_until)
    check_records(arguments.records, sweep.runs)
    for planned in sweep.runs:
        RunFolder(sweep.folder(planned)).check_free(planned.config)
    statuses = sweep.statuses()
    missing = [planned for planned in sweep.runs if not statuses[planned.name].is_evaluated]
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, handler)
        placement = _placement(arguments, len(missing)) if missing else None
        if placement is not None:
            stack.enter_context(contextlib.closing(placement))
        if handler is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, _terminate)  # only now: Ray sets a handler that ends the process
        seconds, reason = _prepared(sweep, missing, statuses, placement)
        sweep.terminal.print(plan_table(sweep.runs, statuses, seconds))
        _print(sweep, remaining(len(sweep.runs), len(missing), seconds, placement, reason))
        if arguments.dry_run:
            return
        try:
            if placement is not None:
                _run_missing(sweep, missing, placement)
        finally:
            if arguments.records is not None:
                count = write_records(arguments.records, sweep.statuses().values(), arguments.keep_images)
                if count:
                    _print(sweep, f"{number_of(count, 'Record')}: {arguments.records}")


def _terminate(number: int, frame: FrameType | None) -> None:
    """Let the first SIGTERM end the command, and ignore further ones, which would cut short its cleanup."""
    signal.signal(number, signal.SIG_IGN)
    raise Stopped(number, "by SIGTERM")


def _print(sweep: Sweep, text: str) -> None:
    sweep.terminal.print(text, soft_wrap=True)


def _placement(arguments: SweepArguments, runs: int) -> Placement | None:
    """The placement that executes the runs; None for a dry run on a cluster. Raises UserError if it cannot execute them."""
    runtime = arguments.runtime
    if arguments.placement == "local":
        find_device(runtime)
    request = Request(
        runs, arguments.out, arguments.workers, runtime.threads, runtime.device, arguments.address, arguments.slurm
    )  # fmt: skip
    placement_type = placement_class(arguments.placement)
    placement_type.check(request)
    return None if arguments.dry_run and arguments.placement != "local" else placement_type(request)


def _prepared(
    sweep: Sweep, missing: Sequence[Planned], statuses: Statuses, placement: Placement | None
) -> tuple[Mapping[str, float], str]:
    """Estimate the seconds of the missing runs. Where an estimate is missing, the second value says why: a dry run cannot read its
    data, or the probing took its share of --minutes."""
    try:
        counts_by_data = sizes([planned.config.data for planned in missing])
    except UserError as error:
        if not sweep.arguments.dry_run:
            raise
        return {}, str(error)
    if missing and not sweep.arguments.dry_run:
        sweep.arguments.out.mkdir(parents=True, exist_ok=True)
    seconds = _seconds(sweep, missing, counts_by_data, statuses, placement)
    return seconds, "" if len(seconds) == len(missing) else "the probing ended to leave time for the runs"


def _seconds(
    sweep: Sweep, missing: Sequence[Planned], counts_by_data: Sizes, statuses: Statuses, placement: Placement | None
) -> dict[str, float]:  # fmt: skip
    arguments, preset, estimates = sweep.arguments, preset_or_attacks(sweep.preset), {}
    runtime = arguments.runtime.replace(threads=arguments.runtime.threads if placement is None else placement.threads)
    probed = runtime
    if arguments.placement != "local":  # a cluster's machines may have a GPU when this one has none
        probed = runtime.replace(device="auto", dispatch="auto")
    timings_by_config = timings([sweep.folder(planned) for planned in sweep.runs], preset)
    with sweep.terminal.status("probing") as status:
        cache, retime = None if arguments.dry_run else arguments.out / PROBE, arguments.minutes is None
        probe = Probe(set_up_device(probed), cache, lambda text: status.update(Text(f"probing {text}")), retime)
        for planned in missing:
            if time.monotonic() > sweep.probe_until:
                break
            config, image_counts = planned.config.replace(runtime=runtime), counts_by_data[planned.config.data]
            pace = probe.pace(config.replace(runtime=probed), image_spec(config))
            timing = timings_by_config.get(same_but_seed(config), UNKNOWN)
            training = training_seconds(config, image_counts, pace, statuses[planned.name].epoch, timing)
            evaluation = timing.evaluation or evaluation_seconds(config, image_counts, pace, preset)
            estimates[planned.name] = training + evaluation
    return estimates


def _run_missing(sweep: Sweep, missing: Sequence[Planned], placement: Placement) -> None:
    """Execute the missing runs. Raises SystemExit if a run failed, or if the time is up and runs remain."""
    jobs = [Job(sweep.folder(planned), planned.config, sweep.preset) for planned in missing]
    before = {job.name: sweep.status(job.name).progress for job in jobs}
    with Board(sweep.terminal, sweep.arguments.out, [planned.name for planned in sweep.runs], sweep.status) as board:
        outcome = drive(placement, jobs, board.refresh, sweep.until)
    _print(sweep, f"{sweep.arguments.out}: {counts(sweep.statuses())}")
    _end(sweep, jobs, outcome, any(sweep.status(name).progress != progress for name, progress in before.items()))


def _end(sweep: Sweep, jobs: Sequence[Job], outcome: SweepOutcome, progressed: bool) -> None:
    """Print which runs failed and how many remain. Raises SystemExit if there are any."""
    for name, line in outcome.failed.items():
        print(f"{name}: {line} (see {sweep.arguments.out / name / LOG})", file=sys.stderr)
    if outcome.failed:
        summary = f"{len(outcome.failed)} of {len(jobs)} runs failed: {', '.join(outcome.failed)}"
        print(f"advmoe: error: {summary}; the same command tries again", file=sys.stderr)
    if outcome.remaining and progressed:
        runs = "1 run remains" if len(outcome.remaining) == 1 else f"{len(outcome.remaining)} runs remain"
        print(f"{runs}; the same command continues", file=sys.stderr)
        raise SystemExit(WORK_LEFT)
    if outcome.remaining and not outcome.failed:
        reason = "nothing was saved in this time, no checkpoint and no attack; give more --minutes or fewer --save-minutes"
        print(f"advmoe: error: {reason}", file=sys.stderr)
    if outcome.remaining or outcome.failed:
        raise SystemExit(FAILED)

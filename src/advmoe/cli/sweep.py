"""`advmoe sweep`."""

import contextlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from advmoe.attacks.presets import resolve
from advmoe.cli.parsing import Flag, console, device, parse
from advmoe.config import RuntimeConfig
from advmoe.errors import UserError
from advmoe.runs.cost import image_spec
from advmoe.sweep.folder import PROBE, check_free, keep_plan
from advmoe.sweep.job import Job, asked
from advmoe.sweep.past import alike, past
from advmoe.sweep.placement import Placement, drive, local
from advmoe.sweep.plan import MOST_SEEDS, Planned, Settings, grid, plan
from advmoe.sweep.probe import UNKNOWN, Probe, Sizes, evaluation_seconds, sizes, training_seconds
from advmoe.sweep.show import Board, States, counts, plan_table, remaining
from advmoe.sweep.states import LOG, state_of


@dataclass(frozen=True)
class SweepArguments:
    """Train and evaluate every run of one of the paper's tables or figures, or of a grid in a YAML file.

    Nothing is run twice: stopped or killed, the same command goes on where it was.
    """

    what: tyro.conf.Positional[str]
    """a1, a2, fig7, figA2, or FILE.yaml with methods, backbones, datasets, model_scales, seeds and settings."""
    out: Path
    """The folder of the runs: one folder each, NAME-sSEED."""
    seeds: int | None = None
    """Runs of each cell, with seeds from 0 on; by default the file's, or 3."""
    dry_run: Flag = False
    """Print the plan and write nothing."""
    only: tuple[str, ...] = ()
    """Only the runs whose name holds every one of these texts (resnet18, advmoe, r0.5, s0)."""
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
    preset: tuple[str, ...] = ("quick",)
    """What runs are evaluated with: quick, standard, full, or names of attacks."""
    placement: Literal["local", "ray", "slurm"] = "local"
    """Where runs run: processes of this machine, tasks of a Ray cluster, jobs of Slurm (extras ray and slurm)."""
    workers: int | None = None
    """Runs at once; by default one for each CUDA device, or up to four on the CPU (Slurm: no bound)."""
    address: str | None = None
    """Ray: address of a running cluster, or auto. Slurm: submitit's executor, local or debug where there is no Slurm."""
    slurm: tuple[str, ...] = ()
    """Slurm: submitit's parameters as KEY=VALUE (slurm_partition=gpu gpus_per_node=1 timeout_min=600)."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        for name in ("seeds", "workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.seeds is not None and self.seeds > MOST_SEEDS:
            raise UserError(f"seeds must be at most {MOST_SEEDS}, not {self.seeds}")
        if self.address is not None and self.placement == "local":
            raise UserError("--address is for --placement ray or slurm")
        if self.slurm and self.placement != "slurm":
            raise UserError("--slurm is for --placement slurm")
        resolve(asked(self.preset))

    @property
    def settings(self) -> Settings:
        """What the command line sets of every run's configuration."""
        given: dict[str, dict[str, int | str | None]] = {
            "training": {"epochs": self.epochs, "batch_size": self.batch_size},
            "model": {"width": self.width},
            "data": {"limit_train": self.limit_train, "limit_test": self.limit_test, "data_dir": self.data_dir},
        }
        return {section: {name: v for name, v in fields.items() if v is not None} for section, fields in given.items()}


def run(words: list[str]) -> None:
    """`advmoe sweep`; ends with status 1 where a run failed."""
    arguments = parse(SweepArguments, "sweep", words)
    terminal, runs = console(), _planned(arguments)
    for planned in runs:
        check_free(arguments.out / planned.name, planned.config)
    states = _states(arguments, runs)
    missing = [planned for planned in runs if states[planned.name].kind != "done"]
    with contextlib.ExitStack() as stack:
        placement = _placement(arguments, len(missing)) if missing else None
        if placement is not None:
            stack.enter_context(contextlib.closing(placement))
        seconds, reason = _prepared(arguments, runs, missing, placement, terminal)
        terminal.print(plan_table(runs, states, seconds))
        terminal.print(
            remaining(len(runs), len(missing), seconds, placement, reason), highlight=False, markup=False, soft_wrap=True
        )
        if placement is not None and not arguments.dry_run:
            _run_missing(arguments, runs, missing, placement, terminal)


def _planned(arguments: SweepArguments) -> list[Planned]:
    found = grid(arguments.what)
    if arguments.seeds is not None:
        found = replace(found, seeds=tuple(range(arguments.seeds)))
    runs = plan(found, arguments.only, arguments.dataset, arguments.settings)
    return [replace(planned, config=replace(planned.config, runtime=arguments.runtime)) for planned in runs]


def _states(arguments: SweepArguments, runs: Sequence[Planned]) -> States:
    return {planned.name: state_of(arguments.out / planned.name, asked(arguments.preset)) for planned in runs}


def _placement(arguments: SweepArguments, runs: int) -> Placement | None:
    """Where the runs go; a dry run calls on no cluster. Raises UserError where a place is not to be had."""
    workers, runtime = arguments.workers, arguments.runtime
    if arguments.placement == "local":
        device(replace(runtime, threads=0))
        return local(runs, workers, runtime.threads, runtime.device)
    module = importlib.import_module(f"advmoe.sweep.{arguments.placement}")  # needs its extra
    if arguments.placement == "slurm":
        module.check(arguments.address, arguments.slurm)
    if arguments.dry_run:
        return None
    common = (arguments.address, workers, runtime.threads, runtime.device)
    more = (arguments.out, arguments.slurm) if arguments.placement == "slurm" else ()
    found: Placement = module.place(*common, *more)
    return found


def _prepared(
    arguments: SweepArguments, runs: Sequence[Planned], missing: Sequence[Planned], placement: Placement | None, terminal: Console
) -> tuple[Mapping[str, float], str]:
    """Read the data, write the plan down, probe; give the missing runs' seconds. A dry run without the data gives the reason
    why there are none."""
    try:
        known = sizes([planned.config.data for planned in missing])
    except UserError as error:
        if not arguments.dry_run:
            raise
        return {}, str(error)
    if missing and not arguments.dry_run:
        keep_plan(arguments.out, arguments.what, runs, arguments.preset)
    return _seconds(arguments, runs, missing, known, placement, terminal), ""


def _seconds(
    arguments: SweepArguments, runs: Sequence[Planned], missing: Sequence[Planned], known: Sizes, placement: Placement | None,
    terminal: Console,
) -> dict[str, float]:  # fmt: skip
    runtime = replace(arguments.runtime, threads=arguments.runtime.threads if placement is None else placement.threads)
    if arguments.placement != "local":  # what a cluster's machines have may be missing here
        runtime = replace(runtime, device="auto", dispatch="auto")
    place = device(runtime)
    states, preset, found = _states(arguments, missing), asked(arguments.preset), {}
    told = past([arguments.out / planned.name for planned in runs], preset)
    with terminal.status("probing") as status:
        probe = Probe(place, None if arguments.dry_run else arguments.out / PROBE, lambda what: status.update(f"probing {what}"))
        for planned in missing:
            config, counted = replace(planned.config, runtime=runtime), known[planned.config.data]
            pace, earlier = probe.pace(config, image_spec(config)), told.get(alike(config), UNKNOWN)
            training = training_seconds(config, counted, pace, states[planned.name].epoch, earlier)
            evaluation = evaluation_seconds(config, counted, pace, preset)
            found[planned.name] = training + (evaluation if earlier.evaluation is None else earlier.evaluation)
    return found


def _run_missing(
    arguments: SweepArguments, runs: Sequence[Planned], missing: Sequence[Planned], placement: Placement, terminal: Console
) -> None:
    """Run what is missing. Raises SystemExit with status 1, with what failed named, where a run failed."""
    jobs = [Job(arguments.out / planned.name, planned.config, arguments.preset) for planned in missing]
    with Board(terminal, arguments.out, lambda: _states(arguments, runs)) as board:
        failed = drive(placement, jobs, board.look)
    terminal.print(f"{arguments.out}: {counts(_states(arguments, runs))}", highlight=False, soft_wrap=True)
    if failed:
        for name, line in failed.items():
            print(f"{name}: {line} (see {arguments.out / name / LOG})", file=sys.stderr)
        some = f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}"
        print(f"advmoe: error: {some}; the same command tries again", file=sys.stderr)
        raise SystemExit(1)

"""Train and evaluate the paper's five methods (ResNet-18, r 0.5, N 2) in slices: each call goes on where the last one stopped.

    python scripts/five_methods.py --data-dir DIR [--dataset cifar10] [--minutes 9] [other words go to `advmoe train`]

Runs lie in --runs, a folder a method and seed. A call ends by itself within --minutes: with 0 where all is done (the Records
are in --out then), with 75 where work is left (call it again), with 1 where only failures are left or no slice is long enough,
with 2 where what was asked for cannot be, other settings of runs that are there among it.
Training is stopped between two epochs where the next would not fit; an evaluation keeps every attack on every shard.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import IO, Any

import tyro

from advmoe.attacks.presets import resolve
from advmoe.cli.evaluate import EvaluateArguments
from advmoe.cli.parsing import Source, configured, parse
from advmoe.cli.train import TrainArguments
from advmoe.config import RunConfig
from advmoe.errors import UserError
from advmoe.files import write_json
from advmoe.recipes import BASES
from advmoe.reports.tables import worst_of
from advmoe.runs.status import number, read_run
from advmoe.sweep.folder import check_free
from advmoe.sweep.plan import MOST_SEEDS
from advmoe.sweep.states import FAILED, state_of

ROOT = Path(__file__).parents[1]
METHODS = ("at_dense", "at_small_dense", "at_sparse", "at_moe", "advmoe")
ADVMOE = (sys.executable, "-m", "advmoe")
DONE, STUCK, REFUSED, WORK_LEFT = 0, 1, 2, 75  # 75: EX_TEMPFAIL of sysexits.h, "try again"
MARGIN = 20.0  # seconds kept for starting and ending
SLOWER = 1.2  # how much longer than the last epoch the next may take
POLL = 0.2  # seconds between looks


@dataclass
class Job:
    """A run's training or evaluation in a process of its own; what the run had come to at its start."""

    run: Path
    what: str
    process: subprocess.Popen[str]
    said: IO[str]
    before: tuple[int, int]
    epochs: int

    def stop(self) -> None:
        """End the process, wherever it is: what lies on the disk is whole."""
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ends_an_epoch(self) -> float:
        """Seconds of the last epoch, where it ended since the last look; else 0."""
        rows = read_run(self.run).rows
        if len(rows) <= self.epochs:
            return 0.0
        self.epochs = len(rows)
        return number(rows[-1], "train_seconds") + number(rows[-1], "validate_seconds")

    def complaint(self, wanted: EvaluateArguments) -> str:
        """Why it failed, by the last line of its errors; "" where it did not."""
        if self.process.returncode == 0:
            return "" if left(self.run, wanted) != self.what else f"advmoe {self.what} ended well and left the work undone"
        self.said.seek(0)
        return " ".join(self.said.read().strip().splitlines()[-1:]) or f"ended with status {self.process.returncode}"


@dataclass
class Slice:
    """One call: `waiting` runs are worked on, --at-once at a time, until `deadline` (of time.monotonic)."""

    options: argparse.Namespace
    deadline: float
    waiting: list[Path]
    jobs: list[Job] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)
    progress: bool = False

    def work(self) -> None:
        """Do what fits."""
        try:
            while self.jobs or (self.waiting and time.monotonic() < self.deadline):
                while self.waiting and len(self.jobs) < self.options.at_once:
                    self.jobs.append(start(self.waiting.pop(0), self.options))
                time.sleep(POLL)
                for job in list(self.jobs):
                    self.look(job)
        finally:
            for job in self.jobs:
                job.stop()

    def look(self, job: Job) -> None:
        """Stop a job for which it is too late; let another take the place of one that ended."""
        epoch = job.ends_an_epoch() if job.what == "train" else 0.0
        late = time.monotonic() + SLOWER * epoch >= self.deadline and job.process.poll() is None
        if late:
            job.stop()
        if job.process.poll() is None:
            return
        self.jobs.remove(job)
        self.progress = self.progress or reached(job.run) > job.before
        complaint = "" if late else job.complaint(self.options.wanted)
        if complaint:
            self.failed[job.run] = complaint
        elif not late and left(job.run, self.options.wanted):
            self.waiting.insert(0, job.run)


def reached(run: Path) -> tuple[int, int]:
    """Epochs done, and results of the evaluation on the disk; it rises with all that a kill does not take away."""
    store = run / "evaluation"
    shards = [_held(path) for path in store.glob("shard-*.json")]
    checks = [_held(path) for path in store.glob("checks.json")]
    state = read_run(run)
    results = sum(1 + len(shard.get("attacks", ())) for shard in shards if shard) + sum(map(len, checks))
    return state.epoch, results + (state.record is not None)


def _held(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; nothing where it is cut short, of which the evaluation itself complains."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def left(run: Path, wanted: EvaluateArguments) -> str:
    """What a run still needs: "train", "evaluate" or "" for nothing."""
    state = state_of(run, wanted.preset)
    if not 0 < state.epochs <= state.epoch:
        return "train"
    record = read_run(run).record if state.kind == "done" else None
    return "" if record is not None and evaluated_so(record, wanted) else "evaluate"


def evaluated_so(record: Mapping[str, Any], wanted: EvaluateArguments) -> bool:
    """Whether a Record is of the threat, the images and the draws that --evaluate names."""
    try:
        trained, limit = record["config"]["attack"]["epsilon"], record["config"]["data"]["limit_test"]
        threat = (record["norm"], record["attack_seed"], record["epsilon"])
    except (KeyError, TypeError):  # a file of another kind
        return False
    epsilon = trained if wanted.epsilon is None else wanted.epsilon
    return threat == (wanted.norm, wanted.seed, epsilon) and wanted.limit_test in (None, limit)


def start(run: Path, options: argparse.Namespace) -> Job:
    """Begin, or go on with, what the run needs."""
    what = left(run, options.wanted)
    words = training_words(run, options) if what == "train" else [str(run), *shlex.split(options.evaluate)]
    print(f"{run.name}: {what}", flush=True)
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read when the process has ended)
    process = subprocess.Popen([*ADVMOE, what, *words], stdout=subprocess.DEVNULL, stderr=said, text=True)
    return Job(run, what, process, said, reached(run), read_run(run).epoch)


def training_words(run: Path, options: argparse.Namespace) -> list[str]:
    """The words of `advmoe train` for a run, whose name is METHOD-SEED."""
    method, _, seed = run.name.rpartition("-")
    base = options.dataset if options.dataset in BASES else "cifar10"
    words = ["--recipe", f"{base}-resnet18-{method}", "--dataset", options.dataset, "--seed", seed]
    words += ["--data-dir", options.data_dir] if options.data_dir else []
    return [*words, *options.train, "--out", str(run), "--resume"]


def trained_so(run: Path, options: argparse.Namespace) -> RunConfig:
    """The configuration that the words give a run. Raises UserError where they give none."""
    words = training_words(run, options)
    return parse(TrainArguments, "train", words, TrainArguments(Source(), configured(words), tyro.MISSING)).run


def check(runs: Sequence[Path], options: argparse.Namespace) -> None:
    """Raises UserError where a run's folder holds another run than the one that is asked for, or something else."""
    configs: dict[str, RunConfig] = {}
    for run in runs:
        method, _, seed = run.name.rpartition("-")
        if method not in configs:
            configs[method] = trained_so(run, options)
        check_free(run, replace(configs[method], seed=int(seed)), "--runs")


def line(run: Path, wanted: EvaluateArguments) -> str:
    """How a run stands."""
    state, what = read_run(run), left(run, wanted)
    if not what and state.record is not None:
        quick = "" if "ra_worst" in state.record else " (quick)"
        return f"{run.name}: done, SA {state.record['sa']:.1f}, RA-worst{quick} {worst_of(state.record):.1f}"
    detail = f"{state.epoch} of {state.epochs or '?'} epochs" if what == "train" else f"{reached(run)[1]} results kept"
    return f"{run.name}: left to {what} ({detail})"


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The options; `train` holds the words that are not ours, `wanted` what --evaluate says. Raises UserError on wrong ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir")
    parser.add_argument("--minutes", type=float, default=9.0, help="length of this slice")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method, seeds from 0")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--at-once", type=int, default=1, help="processes side by side")
    parser.add_argument("--evaluate", default="--quick", help="words for `advmoe evaluate`, in one argument")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/five_methods")
    parser.add_argument("--out", type=Path, default=ROOT / "results/five_methods.json", help="where the Records go in the end")
    try:
        options, others = parser.parse_known_args(_joined(sys.argv[1:] if words is None else words))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    options.train = others
    if not 0 < options.minutes < inf:
        raise UserError(f"--minutes must be positive and finite, not {options.minutes}")
    if not 1 <= options.seeds <= MOST_SEEDS:
        raise UserError(f"--seeds must be from 1 to {MOST_SEEDS}, not {options.seeds}")
    if options.at_once < 1:
        raise UserError(f"--at-once must be at least 1, not {options.at_once}")
    options.wanted = parse(EvaluateArguments, "evaluate", [str(options.runs), *shlex.split(options.evaluate)])
    resolve(options.wanted.preset)
    if options.wanted.fresh or options.wanted.part is not None:
        raise UserError("--evaluate: --fresh and --part are nothing for slices, which add up by themselves")
    return options


def _joined(words: Sequence[str]) -> list[str]:
    """--evaluate's words beside it: argparse takes a lone `--standard` for an option of its own."""
    found = list(words)
    if "--evaluate" in found[:-1]:
        place = found.index("--evaluate")
        found[place : place + 2] = [f"--evaluate={found[place + 1]}"]
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Work one slice; give the exit status."""
    started = time.monotonic()
    try:
        options = parsed(words)
        methods = dict.fromkeys(options.methods)
        runs = [options.runs / f"{method}-{seed}" for seed in range(options.seeds) for method in methods]
        check(runs, options)
        return work(runs, options, started + 60 * options.minutes - MARGIN)
    except (UserError, OSError) as error:
        print(f"five_methods: error: {error}", file=sys.stderr)
        return REFUSED


def work(runs: Sequence[Path], options: argparse.Namespace, deadline: float) -> int:
    """Work until `deadline`; tell how the runs stand, and give the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a killed call takes its processes along
    for run in runs:
        (run / FAILED).unlink(missing_ok=True)  # of earlier calls: it is tried again
    own = Slice(options, deadline, [run for run in runs if left(run, options.wanted)])
    own.work()
    told = [f"failed: {run.name}: {why}" for run, why in own.failed.items()]
    print(*(line(run, options.wanted) for run in runs), *told, sep="\n")
    remaining = [run for run in runs if left(run, options.wanted)]
    if not remaining:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, [read_run(run).record for run in runs], indent=1)
        print(f"all done: {options.out}")
        return DONE
    if set(remaining) <= own.failed.keys():
        return STUCK
    if not own.progress:
        print("no epoch and no attack was done: give this more --minutes, or fewer images (--limit-train, --limit-test)")
        return STUCK
    print("work is left: call again")
    return WORK_LEFT


if __name__ == "__main__":
    sys.exit(main())

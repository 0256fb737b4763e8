"""One run of a sweep: `advmoe train --resume`, then `advmoe evaluate`, in one process that writes its output to RUN/log.txt.

The process ends when its parent ends, even if the parent is killed: it waits for the end of a pipe from the parent, and then has
GRACE seconds to save a checkpoint. It holds the lock RUN/.lock, so that only one process at a time works on a run. Files are
replaced atomically, so the process can be killed at any moment and started again. A folder is claimed under the lock DIR/.lock of
its parent folder, because RUN must be empty until then.
"""

import contextlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from advmoe import extension
from advmoe.attacks.presets import preset_or_attacks, resolve
from advmoe.config import RunConfig, dump_yaml
from advmoe.errors import UserError
from advmoe.evaluation.store import STORE, is_of_older_schema
from advmoe.evaluation.target import SCHEMA
from advmoe.files import write_atomically
from advmoe.parent import GRACE, end_with_parent
from advmoe.runs.failure import FAILED, mark_failed
from advmoe.runs.run_files import read_text
from advmoe.runs.status import LOG, read_run
from advmoe.training.checkpoint import RunFolder

LOCK = ".lock"  # in the folder of a sweep: locked while a process claims the folder of a run
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """A run to train and evaluate in `folder`. `preset` has the name of one evaluation preset, or of attacks."""

    folder: Path
    config: RunConfig
    preset: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the run and its folder."""
        return self.folder.name

    def at(self, device: str, threads: int) -> "Job":
        """The same job with a device and a number of threads, and with absolute paths of its folder and `data_dir`."""
        data, runtime = self.config.data, self.config.runtime
        data_dir = None if data.data_dir is None else str(Path(data.data_dir).absolute())
        data = data.replace(data_dir=data_dir, workers=data.workers or threads)
        config = self.config.replace(data=data, runtime=runtime.replace(device=device, threads=threads))
        return replace(self, folder=self.folder.absolute(), config=config)


def commands(job: Job) -> list[list[str]]:
    """The commands that remain to be run, as arguments of `advmoe`. All settings of the training are in RUN/config.yaml."""
    runtime, preset = job.config.runtime, preset_or_attacks(job.preset)
    if read_run(job.folder, resolve(preset).attacks).is_evaluated:
        return []
    attacks = [f"--{preset}"] if isinstance(preset, str) else ["--attacks", *preset]
    machine = ["--device", runtime.device, "--threads", str(runtime.threads), "--dispatch", runtime.dispatch]
    flags = ["--deterministic"] if runtime.deterministic else []
    if is_of_older_schema(job.folder / STORE, SCHEMA):
        flags.append("--fresh")
    train = ["train", "--out", str(job.folder), "--resume"]
    evaluate = ["evaluate", str(job.folder), *attacks, *machine, "--precision", runtime.precision, *flags]
    return [train, evaluate]  # if the run is trained, the first ends at once


def start(job: Job) -> subprocess.Popen[bytes]:
    """Start the job's process. Raises UserError if the folder holds another run."""
    _claim(job)
    (job.folder / FAILED).unlink(missing_ok=True)
    argv = [sys.executable, "-m", "advmoe.sweep.job", str(job.folder), *job.preset]
    environment = {**os.environ, **dict.fromkeys(THREADS, str(max(job.config.runtime.threads, 1)))}
    with (job.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip


def execute(job: Job) -> tuple[str | None, bool]:
    """Run the job's process to its end. Returns its error, or None if it succeeded, and whether it was killed."""
    try:
        process = start(job)
    except (UserError, OSError) as error:
        return str(error), False
    try:
        return record_failure(job, process.wait()), process.returncode < 0
    finally:
        stop([process])


def _claim(job: Job) -> None:
    """Claim the run's folder. A run that is there goes on with the settings of this job that may change: runtime, location of the
    data, and what to do on a NaN."""
    folder = RunFolder(job.folder)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(job.folder.parent / LOCK):
        if not folder.config_path.exists():
            folder.clean()  # left by a process that was killed while it claimed the folder
        folder.check_free(job.config)  # a process may train there: this one does not hold the lock of training
        folder.claim(job.config, resume=True)
        write_atomically(folder.config_path, dump_yaml(job.config))


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Terminate the processes of jobs, and kill them after GRACE seconds. A process that trains saves a checkpoint first."""
    until = time.monotonic() + GRACE
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def record_failure(job: Job, status: int) -> str | None:
    """Write the error of a process that ended with `status` to the run's folder, and return it; None if it succeeded."""
    if status == 0:
        return None
    line = _killed_by(-status) if status < 0 else _last_line(job.folder / LOG)
    mark_failed(job.folder, line)
    return line


def _killed_by(number: int) -> str:
    name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
    return f"killed by {name}" + (" (out of memory?)" if number == signal.SIGKILL else "")


def _last_line(log: Path) -> str:
    lines = read_text(log).splitlines()
    return lines[-1].strip().removeprefix("advmoe: error: ") if lines else "ended without a message"


def main(folder: str, *preset: str) -> None:
    """Run the commands that remain for the run in `folder` one after another, until one fails."""
    end_with_parent()
    run = RunFolder(Path(folder))
    with FileLock(run.path / ".lock"):
        print(f"{socket.gethostname()}, process {os.getpid()}", flush=True)
        try:
            extension.load()  # its attacks may be among those of the preset
            remaining = commands(Job(run.path, run.config(), preset))  # only now: another process may have done the work meanwhile
        except UserError as error:
            raise SystemExit(f"advmoe: error: {error}") from None
        for argv in remaining:
            print("$ advmoe", *argv, flush=True)
            status = _status(argv)
            if status:
                raise SystemExit(status)


def _status(argv: Sequence[str]) -> int | str | None:
    sys.argv = ["advmoe", *argv]
    try:
        runpy.run_module("advmoe", run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


if __name__ == "__main__":
    main(*sys.argv[1:])

"""One run of a sweep: `advmoe train` with resume, then `advmoe evaluate`, in one process whose output goes to RUN/log.txt.

The process ends with the one that started it, however that one ends: it reads a pipe that nothing is written to. It holds
RUN/.lock as long as it lives, so that no two work on one run; whoever comes second waits and finds the work done. All files
are either old or new, so that it may be killed at any moment and started again. Folders are claimed one after another, under
the lock DIR/.lock of the folder above: RUN must be empty until it is claimed.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from advmoe.attacks.presets import PRESETS
from advmoe.config import RunConfig
from advmoe.sweep.states import FAILED, LOG, mark_failed, state_of
from advmoe.training.checkpoint import RunFolder

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """A run to bring to its end in `folder`: `preset` names one of the evaluation's, or attacks."""

    folder: Path
    config: RunConfig
    preset: tuple[str, ...] = ("quick",)

    @property
    def name(self) -> str:
        """The folder's name, which is the run's."""
        return self.folder.name

    def at(self, device: str, threads: int) -> "Job":
        """The same job on its share of a machine, in whatever folder it is started."""
        data, runtime = self.config.data, self.config.runtime
        place = None if data.data_dir is None else str(Path(data.data_dir).absolute())
        data = replace(data, data_dir=place, workers=data.workers or threads)
        config = replace(self.config, data=data, runtime=replace(runtime, device=device, threads=threads))
        return replace(self, folder=self.folder.absolute(), config=config)


def asked(preset: Sequence[str]) -> str | Sequence[str]:
    """A preset's name, or the attacks that `preset` lists."""
    return preset[0] if len(preset) == 1 and preset[0] in PRESETS else preset


def commands(job: Job) -> list[list[str]]:
    """What remains to be done, as words of the command line."""
    data, runtime, state = job.config.data, job.config.runtime, state_of(job.folder, asked(job.preset))
    place = [] if data.data_dir is None else ["--data-dir", data.data_dir]
    place += ["--device", runtime.device, "--threads", str(runtime.threads), "--dispatch", runtime.dispatch]
    workers = [] if data.workers is None else ["--workers", str(data.workers)]
    wanted = asked(job.preset)
    preset = [f"--{wanted}"] if isinstance(wanted, str) else ["--attacks", *wanted]
    train = ["train", "--out", str(job.folder), "--resume", *place, *workers]
    evaluate = ["evaluate", str(job.folder), *preset, *place, "--precision", runtime.precision]
    return [] if state.kind == "done" else [train, evaluate]  # a trained run is seen to be whole in no time


def start(job: Job) -> subprocess.Popen[bytes]:
    """Start the job's process. Raises UserError where the folder is another run's."""
    _claim(job)
    (job.folder / FAILED).unlink(missing_ok=True)
    words = [sys.executable, "-m", "advmoe.sweep.job", str(job.folder / ".lock"), json.dumps(commands(job))]
    with (job.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=log, stderr=log, env=_environment(job.config.runtime.threads),
            start_new_session=True,
        )  # fmt: skip


def _claim(job: Job) -> None:
    folder = RunFolder(job.folder)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(job.folder.parent / ".lock"):
        if not folder.config_path.exists():
            folder.clean()  # what a process left that was killed while it claimed the folder
        folder.claim(job.config, resume=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a job's process; what it saved stays."""
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def ending(job: Job, status: int) -> str | None:
    """What a process that ended with `status` failed with, kept in the run's folder; None where the run is done."""
    if status == 0:
        return None
    line = _killed_by(-status) if status < 0 else _last_line(job.folder / LOG)
    mark_failed(job.folder, line)
    return line


def _environment(threads: int) -> Mapping[str, str]:
    return {**os.environ, **dict.fromkeys(THREADS, str(max(threads, 1)))}


def _killed_by(number: int) -> str:
    name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
    return f"killed by {name}" + (" (out of memory?)" if number == signal.SIGKILL else "")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip().removeprefix("advmoe: error: ") if lines else "ended without a word"


def main(lock: str, work: str) -> None:
    """Do the commands one after another, up to the first that fails."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with FileLock(lock):
        print(f"{socket.gethostname()}, process {os.getpid()}", flush=True)
        for words in json.loads(work):
            print("$ advmoe", *words, flush=True)
            status = _status(words)
            if status:
                raise SystemExit(status)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when the other end of the pipe is closed
    os._exit(1)


def _status(words: Sequence[str]) -> int | str | None:
    sys.argv = ["advmoe", *words]
    try:
        runpy.run_module("advmoe", run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


if __name__ == "__main__":
    main(*sys.argv[1:])

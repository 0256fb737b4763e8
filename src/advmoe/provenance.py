"""The origin of a Record: code, versions, hardware, time."""

import datetime
import functools
import os
import platform
import subprocess
from pathlib import Path

import numpy
import torch
from pydantic import BaseModel

from advmoe.version import __version__


class Hardware(BaseModel):
    """The machine: `cores` is its number of CPU cores, `threads` the number of threads that torch uses."""

    cpu: str
    cores: int | None
    threads: int
    gpu: str | None


class Provenance(BaseModel):
    """Fields of a Record. `commit` is None if the package is not in a checkout; `time` is UTC."""

    advmoe: str
    commit: str | None
    versions: dict[str, str]
    hardware: Hardware
    time: str


def code() -> dict[str, str]:
    """The code that this process runs: the version of the package as 'advmoe' and, in a checkout, its 'commit'."""
    commit = _commit()
    return {"advmoe": __version__} | ({} if commit is None else {"commit": commit})


def provenance() -> Provenance:
    """The provenance of results that this process computes now."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Provenance(
        advmoe=__version__,
        commit=_commit(),
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
        hardware=Hardware(cpu=_cpu(), cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu),
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


@functools.cache
def _commit() -> str | None:
    """The commit of this package's checkout, with '+changes' if files differ from it; None if there is no checkout. It is that of
    the first call, because the checkout may change while the process runs."""
    folder = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not Path(git("rev-parse", "--show-toplevel"), "src", "advmoe").samefile(folder):
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ":/src") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()

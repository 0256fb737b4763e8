"""`advmoe doctor`."""

import json
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path

import torch
from pydantic import BaseModel, Field

from advmoe.benchmark.machine import Host, Machine
from advmoe.cli.arguments.doctor import DoctorArguments
from advmoe.config.choices import Dispatch
from advmoe.installation import PURPOSES, Need, adding, extras, installed, needs
from advmoe.moe.dispatch import available
from advmoe.training.compiled import has_compiler
from advmoe.training.precision import autocast_dtype


class Lack(BaseModel):
    """Libraries that are missing or have the wrong version: requirement -> installed version or None. `add` is the command that
    installs them, "" if nothing is missing."""

    missing: dict[str, str | None]
    add: str


class Extra(Lack):
    """An extra of the package, and what it is for."""

    purpose: str = Field(serialization_alias="for")


class Disk(BaseModel):
    """The disk of `folder`, and its free bytes."""

    folder: str
    free: int


class Diagnosis(Host, Lack):
    """The output of `advmoe doctor`. `libraries` are those that every command needs, with their versions.

    `dispatches` work on the device, `bf16` is whether `--precision auto` uses it, `compiler` whether torch.compile has a compiler.
    """

    torch: str
    cuda: str | None
    dispatches: list[Dispatch]
    bf16: bool
    compiler: bool
    omp_num_threads: str | None
    disk: Disk
    libraries: dict[str, str | None]
    extras: dict[str, Extra]


def run(arguments: DoctorArguments) -> None:
    """`advmoe doctor`."""
    diagnosis = examine(arguments.folder)
    print(*([json.dumps(diagnosis.model_dump(by_alias=True))] if arguments.json else _lines(diagnosis)), sep="\n")
    if diagnosis.add:
        raise SystemExit(1)


def examine(folder: Path) -> Diagnosis:
    """Inspect this machine and installation. Raises UserError if the package is not installed."""
    package = installed()
    required = needs(package)
    lack = _lack(package, required)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = autocast_dtype("auto", device) is not None
    return Diagnosis(
        **Machine.of_this_process().model_dump(exclude={"libraries"}), torch=torch.__version__, cuda=torch.version.cuda,
        dispatches=available(device), bf16=bf16, compiler=has_compiler(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        disk=Disk(folder=str(existing), free=shutil.disk_usage(existing).free),
        libraries={need.name: need.version for need in required}, missing=lack.missing, add=lack.add,
        extras={
            name: Extra(purpose=PURPOSES[name], **_lack(package, needs(package, name)).model_dump()) for name in extras(package)
        },
    )  # fmt: skip


def _lack(package: Distribution, required: list[Need]) -> Lack:
    missing = [need for need in required if not need.met]
    return Lack(missing={need.requirement: need.version for need in missing}, add=adding(package, missing) if missing else "")


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    yield f"advmoe       {diagnosis.advmoe}, torch {diagnosis.torch}, Python {diagnosis.python}, {diagnosis.platform}"
    yield f"device       {diagnosis.gpu or _no_gpu(diagnosis.cuda)}"
    triton = "Triton kernels run here" if "triton" in diagnosis.dispatches else "Triton kernels need CUDA and the package triton"
    yield f"dispatch     {', '.join(diagnosis.dispatches)} ({triton})"
    yield f"bf16         --precision auto takes {'it' if diagnosis.bf16 else 'float32: bf16 is slow or missing'}"
    yield f"compiler     {'C++ compiler for torch.compile' if diagnosis.compiler else 'none for torch.compile on the CPU'}"
    yield f"processor    {diagnosis.cpu}, {diagnosis.cores} cores"
    set_by = "torch's choice" if diagnosis.omp_num_threads is None else f"OMP_NUM_THREADS={diagnosis.omp_num_threads}"
    yield f"threads      {diagnosis.threads} ({set_by}; --threads sets them for a run)"
    yield f"memory       {'unknown' if diagnosis.memory is None else _size(diagnosis.memory)}"
    yield f"disk         {_size(diagnosis.disk.free)} free in {diagnosis.disk.folder}"
    libraries = (f"{name} {version or 'missing'}" for name, version in diagnosis.libraries.items())
    yield f"libraries    {', '.join(libraries)}"
    if diagnosis.add:
        yield from ["", f"missing for every command: {_missing(diagnosis)}", f"  {diagnosis.add}"]
    yield from ["", "extras"]
    for name, extra in diagnosis.extras.items():
        yield f"  {name:12} {f'missing: {_missing(extra)}' if extra.add else 'installed'} ({extra.purpose})"
        yield from ([f"    {extra.add}"] if extra.add else [])


def _missing(lack: Lack) -> str:
    return ", ".join(
        requirement if version is None else f"{requirement} ({version} is installed)"
        for requirement, version in lack.missing.items()
    )


def _no_gpu(cuda: str | None) -> str:
    built = "torch is built without CUDA" if cuda is None else f"torch is built for CUDA {cuda} but there is no CUDA device"
    return f"cpu ({built})"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"

"""`advmoe doctor`."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import torch

from advmoe.benchmark.machine import Machine
from advmoe.cli.arguments.doctor import DoctorArguments
from advmoe.installation import PURPOSES, Need, adding, extras, installed, needs


def run(arguments: DoctorArguments) -> None:
    """`advmoe doctor`."""
    found = examine(arguments.folder)
    print(*([json.dumps(found)] if arguments.json else _lines(found)), sep="\n")
    if found["add"]:
        raise SystemExit(1)


def examine(folder: Path) -> dict[str, Any]:
    """What is here, JSON-ready, sizes in bytes. `add` is the command that brings the libraries in order, empty where they are.

    Raises UserError where the package is not installed.
    """
    package = installed()
    own = needs(package)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return {
        **Machine.here().model_dump(exclude={"libraries"}), "torch": torch.__version__,
        "cuda": torch.version.cuda, "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "disk": {"folder": str(place), "free": shutil.disk_usage(place).free},
        "libraries": {need.name: need.found for need in own}, **_lacking(package, own),
        "extras": {name: {"for": PURPOSES[name], **_lacking(package, needs(package, name))} for name in extras(package)},
    }  # fmt: skip


def _lacking(package: Distribution, asked: list[Need]) -> dict[str, Any]:
    """What is missing or of another version, and the command that adds it."""
    missing = [need for need in asked if not need.met]
    return {"missing": {need.requirement: need.found for need in missing}, "add": adding(package, missing) if missing else ""}


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    disk, memory = found["disk"], found["memory"]
    yield f"advmoe       {found['advmoe']}, torch {found['torch']}, Python {found['python']}, {found['platform']}"
    yield f"device       {found['gpu'] or _no_gpu(found['cuda'])}"
    yield f"processor    {found['cpu']}, {found['cores']} cores"
    set_by = "torch's choice" if found["omp_num_threads"] is None else f"OMP_NUM_THREADS={found['omp_num_threads']}"
    yield f"threads      {found['threads']} ({set_by}; --threads sets them for a run)"
    yield f"memory       {'unknown' if memory is None else _size(memory)}"
    yield f"disk         {_size(disk['free'])} free in {disk['folder']}"
    libraries = (f"{name} {version or 'missing'}" for name, version in found["libraries"].items())
    yield f"libraries    {', '.join(libraries)}"
    if found["add"]:
        yield from ["", f"missing for every command: {_shown(found)}", f"  {found['add']}"]
    yield from ["", "extras"]
    for name, extra in found["extras"].items():
        yield f"  {name:12} {f'missing: {_shown(extra)}' if extra['add'] else 'here'} ({extra['for']})"
        yield from ([f"    {extra['add']}"] if extra["add"] else [])


def _shown(part: Mapping[str, Any]) -> str:
    return ", ".join(asked if has is None else f"{asked} (here is {has})" for asked, has in part["missing"].items())


def _no_gpu(cuda: str | None) -> str:
    built = "torch is built without CUDA" if cuda is None else f"torch is built for CUDA {cuda} and finds no device"
    return f"cpu ({built})"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"

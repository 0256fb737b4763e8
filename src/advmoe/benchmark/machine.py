"""The machine that measurements depend on: processor, memory, versions."""

import importlib.metadata
import os
import platform
from contextlib import suppress

from advmoe.provenance import Hardware, provenance

LIBRARIES = ("torch", "numpy", "pillow", "onnxruntime", "triton")


class Host(Hardware):
    """The machine with its software. `memory` is in bytes."""

    memory: int | None
    platform: str
    advmoe: str
    commit: str | None
    python: str


class Machine(Host):
    """The machine, and the versions of the `libraries` that affect measurements."""

    libraries: dict[str, str]

    @classmethod
    def of_this_process(cls) -> "Machine":
        """This machine, with the versions of the libraries."""
        origin = provenance()
        return cls(
            **origin.hardware.model_dump(), memory=_memory(), platform=platform.platform(), advmoe=origin.advmoe,
            commit=origin.commit, python=origin.versions["python"], libraries=_libraries(),
        )  # fmt: skip


def _memory() -> int | None:
    known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None


def _libraries() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in LIBRARIES:
        with suppress(Exception):  # it is not installed, or its metadata are damaged: measurements are kept in any case
            versions[name] = importlib.metadata.version(name)
    return {name: version for name, version in versions.items() if version}  # None if there are no metadata

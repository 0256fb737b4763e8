"""The arguments of `advmoe doctor`."""

from dataclasses import dataclass
from pathlib import Path

from advmoe.cli.parsing import Flag


@dataclass(frozen=True)
class DoctorArguments:
    """Print versions, the device and what it supports, threads, memory, disk and extras, and how to install what is missing.

    Ends with status 1 if a library that every command needs is missing or of another version.
    """

    folder: Path = Path()
    """Folder for runs: the free space of its disk is printed."""
    json: Flag = False
    """Print one JSON object instead of lines."""

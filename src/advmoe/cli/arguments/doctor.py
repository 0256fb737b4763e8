"""The arguments of `advmoe doctor`."""

from dataclasses import dataclass
from pathlib import Path

from advmoe.cli.parsing import Flag, parse


@dataclass(frozen=True)
class DoctorArguments:
    """Say what is here: versions, device, threads, memory, disk and extras; and the command that adds what is missing.

    Ends with status 1 where a library that every command needs is missing or of another version.
    """

    folder: Path = Path()
    """Folder where runs are to go: the room on its disk is looked at."""
    json: Flag = False
    """Print one JSON object instead of lines."""


def read(words: list[str]) -> DoctorArguments:
    return parse(DoctorArguments, "doctor", words)

"""The file in a run's folder that holds the error with which the run ended."""

from contextlib import suppress
from pathlib import Path
from types import TracebackType

from advmoe.files import write_atomically
from advmoe.training.observers import Observer

FAILED = "failed.txt"  # removed when the run is started again


def mark_failed(folder: Path, line: str) -> None:
    """Write the error with which the run in `folder` ended, unless the folder was removed or is on another machine."""
    with suppress(FileNotFoundError):
        write_atomically(folder / FAILED, f"{line}\n")


class FailureRecorder(Observer):
    """Writes failed.txt when training ends in an error, and removes it when training goes on.

    Before the folder is claimed it writes nothing, because another process may be training there.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.begun = run, False

    def __enter__(self) -> "FailureRecorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.begun and isinstance(error, Exception):
            mark_failed(self.run, " ".join(str(error).split()) or type(error).__name__)

    def begin(self) -> None:
        (self.run / FAILED).unlink(missing_ok=True)
        self.begun = True

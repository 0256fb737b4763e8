"""Locks of the operating system. A lock file names the process that holds it; if that process is killed, the lock ends."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from advmoe.errors import UserError


@contextmanager
def locked(path: Path, target: Path, activity: str, keep: bool = False) -> Iterator[None]:
    """Hold the lock file `path` during the block, and write the name of this process to it. `keep` the file after the block.

    If another process holds it, raises UserError: "`target`: process 7 on HOST is already `activity`".
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        holder = next(iter(read_lines(path)), "") or "another process"
        raise UserError(f"{target}: {holder} is already {activity}") from None
    try:
        sign(path)
        yield
    finally:
        if not keep:
            path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock file `path`, hold it during the block, and then remove it."""
    with FileLock(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def sign(path: Path, *further: str) -> None:
    """Write the name of this process, then `further` lines, to a lock file that it holds."""
    name = f"process {os.getpid()} on {socket.gethostname()}"
    path.write_text("".join(f"{line}\n" for line in (name, *further)), encoding="utf-8")


def read_lines(path: Path) -> list[str]:
    """The lines of a lock file, first the name of the last process that held it; none if there is no file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []

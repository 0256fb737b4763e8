"""The output streams of the command line: warnings, characters that cannot be encoded, and pipes and streams that are closed."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from rich.console import Console

from advmoe.errors import printable

LOG_WIDTH = 200
PIPE_CLOSED = 141  # the exit status that a shell gives for SIGPIPE


def open_missing() -> None:
    """Discard what is written to a stream that was closed before the command started (`>&-`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  # for as long as the process lives


def escape_unencodable() -> None:
    """Write characters that cannot be encoded as escapes, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _WarningLines(logging.Handler):
    """Prints each warning once, as one line, on the present stderr: on a terminal a live display replaces it while it is shown."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(" ".join(record.getMessage().splitlines()))
        if text not in self.printed:
            self.printed.add(text)
            with contextlib.suppress(OSError):  # stderr may be a pipe whose reader has ended
                print(f"warning: {text}", file=sys.stderr)


@contextlib.contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Inside the block, warnings of the logger `advmoe` are lines on stderr."""
    logger, handler = logging.getLogger("advmoe"), _WarningLines()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def discard_output() -> None:
    """Discard further output: its reader has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Continue without output if its reader ends (`| head -1`). By default rich would exit."""
        self.quiet = True
        discard_output()


def console() -> Console:
    """The console of standard output. Text is printed as it is, because names and paths may look like markup.

    In a file or a pipe, tables may be up to LOG_WIDTH columns wide.
    """
    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    return _Console(soft_wrap=False, width=None if fixed else LOG_WIDTH, markup=False, emoji=False, highlight=False)

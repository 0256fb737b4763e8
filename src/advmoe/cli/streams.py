"""The output streams of the command line: characters that cannot be encoded, and pipes and streams that are closed."""

import os
import sys
from io import TextIOWrapper
from pathlib import Path

from rich.console import Console

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


def warn(text: str) -> None:
    """Print a warning of one line on stderr."""
    print(f"warning: {' '.join(text.split())}", file=sys.stderr)


def discard_output() -> None:
    """Discard further output: its reader has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Continue without output if its reader ends (`| head -1`). By default rich would exit."""
        self.quiet = True
        discard_output()


def console() -> Console:
    """The console of standard output. In a file or a pipe, tables may be up to LOG_WIDTH columns wide."""
    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    return _Console(soft_wrap=False, width=None if fixed else LOG_WIDTH)

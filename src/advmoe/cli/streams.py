"""The command line's output streams: encodings that lack characters, and readers that leave."""

import os
import sys
from io import TextIOWrapper

from rich.console import Console

LOG_WIDTH = 200
PIPE_CLOSED = 141  # the exit status that a shell gives for SIGPIPE


def escape_unencodable() -> None:
    """Write characters that an output's encoding lacks as escapes, instead of ending in an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Discard what is still written to standard output: nobody reads it any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on unread when the reader of the output leaves (`| head -1`): rich would end the program."""
        self.quiet = True
        discard_output()


def console() -> Console:
    """The console of standard output. Tables in a file or a pipe are as wide as they need to be, up to LOG_WIDTH."""
    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    return _Console(soft_wrap=False, width=None if fixed else LOG_WIDTH)

"""The command line's output streams: encodings that lack characters, and readers that leave."""

import os
import sys
from io import TextIOWrapper

from rich.console import Console

PIPE_CLOSED = 141  # the exit status that a shell gives for SIGPIPE


def escape_unencodable() -> None:
    """Write characters that an output's encoding lacks as escapes, instead of ending in an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Send what is still written to standard output nowhere: its reader has left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on unread when the reader of the output leaves (`| head -1`): rich would end the program."""
        self.quiet = True
        discard_output()


def console() -> Console:
    """The console of standard output."""
    return _Console(soft_wrap=False)

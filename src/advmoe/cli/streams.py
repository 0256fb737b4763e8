"""The command line's output streams: encodings that lack characters, and readers that leave."""

import os
import sys
from io import TextIOWrapper

PIPE_CLOSED = 141  # the exit status that a shell gives for SIGPIPE


def escape_unencodable() -> None:
    """Write characters that an output's encoding lacks as escapes, instead of ending in an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Send what is still written to standard output nowhere: its reader has left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

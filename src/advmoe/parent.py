"""Processes that end with the process that started them."""

import os
import sys
import threading


def end_with_parent() -> None:
    """End this process when its parent ends, even if that is killed. Standard input must be a pipe from the parent."""
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when the other end of the pipe is closed
    os._exit(1)

"""Processes that end with the process that started them."""

import os
import signal
import sys
import threading
import time

GRACE = 10.0  # seconds in which a process can save a checkpoint before it is killed


def end_with_parent() -> None:
    """End this process when its parent ends, even if that is killed: by SIGTERM, and GRACE seconds later in any case. Standard
    input must be a pipe from the parent."""
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when the other end of the pipe is closed
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)

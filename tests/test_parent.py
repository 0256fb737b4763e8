"""A process that ends when its parent closes the pipe to it, which the end of the parent does."""

import signal
import subprocess
import sys

import pytest

CHILD = "import time; from advmoe.parent import end_with_parent; end_with_parent(); print(flush=True); time.sleep(600)"


DEAF = "import signal, advmoe.parent; advmoe.parent.GRACE = 0.1; signal.signal(signal.SIGTERM, signal.SIG_IGN); "


@pytest.mark.parametrize(("code", "status"), [(CHILD, -signal.SIGTERM), (DEAF + CHILD, 1)])
def test_the_process_ends_when_the_pipe_from_its_parent_is_closed(code: str, status: int) -> None:
    """By SIGTERM, so that a training saves a checkpoint; a process that ignores it ends too."""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=60) == status

"""A process that ends when its parent closes the pipe to it, which the end of the parent does."""

import subprocess
import sys

CHILD = "import time; from advmoe.parent import end_with_parent; end_with_parent(); print(flush=True); time.sleep(600)"


def test_the_process_ends_when_the_pipe_from_its_parent_is_closed() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=60) == 1

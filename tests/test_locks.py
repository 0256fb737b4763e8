"""A lock file: one process holds it, the message names that process, and the lock ends with it."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from advmoe.errors import UserError
from advmoe.locks import locked, read_lines, sign, turn

HOLDER = """
import sys, time
from pathlib import Path
from advmoe.locks import locked
with locked(Path(sys.argv[1]), Path("run"), "busy"):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        for _ in range(2):  # a refused process does not change the file
            message = rf"^a/run: process {process.pid} on \S+ is already busy; wait$"
            with pytest.raises(UserError, match=message), locked(path, Path("a/run"), "busy; wait"):
                pass
        process.kill()
    with locked(path, tmp_path, "busy"):
        assert read_lines(path)[0] != f"process {process.pid}"


def test_a_lock_is_free_after_its_block_even_if_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(KeyboardInterrupt), locked(path, tmp_path, "busy"):
        raise KeyboardInterrupt
    with locked(path, tmp_path, "busy", keep=True):
        assert [file.name for file in tmp_path.iterdir()] == ["lock"]
        sign(path, "first", "second")
    assert read_lines(path)[1:] == ["first", "second"]
    with locked(path, tmp_path, "busy"):
        pass
    assert not list(tmp_path.iterdir())


def test_turns_do_not_overlap(tmp_path: Path) -> None:
    path, events = tmp_path / "lock", []

    def second() -> None:
        with turn(path):
            events.append("second")

    with turn(path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        events.append("first")
    thread.join()
    assert events == ["first", "second"]
    assert not list(tmp_path.iterdir())


def test_a_holder_without_a_name_is_another_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, tmp_path, "busy"):
        path.write_text("")
        with pytest.raises(UserError, match=r": another process is already busy$"), locked(path, tmp_path, "busy"):
            pass
    assert read_lines(tmp_path / "none") == []

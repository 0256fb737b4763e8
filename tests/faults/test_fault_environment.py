"""Two processes on one folder, locks of dead processes, changed and read-only data, moved folders, clocks set back."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_runs import ALWAYS, advmoe, assert_same, end, in_a_step, trained
from PIL import Image

from advmoe.training.checkpoint import LOCK, RunFolder

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

ArgumentsOf = Callable[..., list[str | Path]]


def stopped(arguments: list[str | Path], run: Path) -> None:
    """Train up to the fifth of six steps, and save."""
    with in_a_step(arguments, run, 5) as process:
        process.send_signal(signal.SIGTERM)
    assert end(process).status == 143


# Two processes


def test_the_second_refuses_and_names_the_first(
    method: str, arguments_of: ArgumentsOf, run: Path, unbroken: Callable[[str], Path], tried: Callable[..., Any]
) -> None:
    arguments = arguments_of(method)
    with tried("two processes on one run folder", method):
        with in_a_step(arguments, run, 5) as first:
            for _ in range(2):  # a refused process does not change the lock
                second = advmoe(*arguments)
                assert second.status == 2, second.text
                assert str(run) in second.error_line
                assert re.search(rf"\b{first.pid}\b", second.error_line), second.error_line
                assert socket.gethostname() in second.error_line
        assert end(first).status == 0
        assert_same(run, unbroken(method))


def test_a_dead_processes_lock_is_taken_over(
    method: str, arguments_of: ArgumentsOf, run: Path, unbroken: Callable[[str], Path], tried: Callable[..., Any]
) -> None:
    arguments = arguments_of(method)
    with tried("stale lock of a dead process", method):
        with in_a_step([*arguments, *ALWAYS], run, 5) as first:
            first.kill()
            end(first)
        assert (run / LOCK).exists()
        ended = trained(*arguments)
        assert not re.search(rf"{LOCK}|\b{first.pid}\b", ended.text)
        assert_same(run, unbroken(method))


def test_a_lock_that_names_a_living_stranger_is_taken_over(
    arguments_of: ArgumentsOf, run: Path, unbroken: Callable[[str], Path]
) -> None:
    """The number of a dead process may belong to another one now."""
    run.mkdir()
    (run / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert LOCK not in trained(*arguments_of("advmoe")).text
    assert_same(run, unbroken("advmoe"))


# Data


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with 32 images of two classes."""
    folder, draw = tmp_path / "images", np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(16):
            Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
    return folder


def with_images(arguments_of: ArgumentsOf, method: str, folder: Path) -> list[str | Path]:
    return [
        *arguments_of(method, dataset="folder", limit_train=None, limit_test=None, batch_size=5, data_dir=None),
        "--data-dir",
        folder,
    ]


def test_a_file_that_changes_before_a_resume(
    method: str, arguments_of: ArgumentsOf, run: Path, images: Path, tried: Callable[..., Any]
) -> None:
    arguments = with_images(arguments_of, method, images)
    with tried("data changed before a resume", method):
        stopped(arguments, run)
        before = RunFolder(run).latest()
        assert before is not None
        Image.new("RGB", (12, 12), (1, 2, 3)).save(images / "cat" / "3.png")
        ended = advmoe(*arguments)
        assert ended.status == 2
        match = re.fullmatch(
            r"advmoe: error: .*: was trained on data with fingerprint ([0-9a-f]+), not ([0-9a-f]+)", ended.error_line
        )
        assert match, ended.error_line
        assert match[1] == before.fingerprint != match[2]


STREAMED = {
    "dataset": "imagenet",
    "stem": "imagenet",
    "limit_train": None,
    "limit_test": None,
    "batch_size": 6,
    "workers": 1,
    "width": 2,
}


def streamed_images(folder: Path) -> Path:
    """ImageNet's form: 3 classes of 8 and 2 images."""
    draw = np.random.default_rng(0)
    for part, each in (("train", 8), ("val", 2)):
        for name in ("n01", "n02", "n03"):
            (folder / part / name).mkdir(parents=True)
            for number in range(each):
                image = Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((64, 64))
                image.save(folder / part / name / f"{number}.JPEG")
    return folder


def test_a_file_that_changes_between_epochs(
    method: str, arguments_of: ArgumentsOf, run: Path, tmp_path: Path, tried: Callable[..., Any]
) -> None:
    folder = streamed_images(tmp_path / "imagenet")
    arguments = [*arguments_of(method, **STREAMED), "--data-dir", folder]
    with tried("a data file changed between epochs", method):
        with in_a_step(arguments, run, 2) as process:  # the first epoch's
            for path in folder.rglob("*.JPEG"):
                path.write_bytes(path.read_bytes())
        ended = end(process)
        assert ended.status == 2, ended.text
        time_ = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9} UTC"
        changed = rf"\.JPEG: changed since the run began \(modified at {time_}, before at {time_}\)"
        assert re.search(changed, ended.error_line), ended.error_line


def test_a_longer_file_before_a_resume_of_streamed_data(arguments_of: ArgumentsOf, run: Path, tmp_path: Path) -> None:
    folder = streamed_images(tmp_path / "imagenet")
    arguments = [*arguments_of("at_moe", **STREAMED), "--data-dir", folder]
    stopped(arguments, run)
    path = folder / "train" / "n02" / "3.JPEG"
    path.write_bytes(path.read_bytes() + b"more")
    ended = advmoe(*arguments)
    assert ended.status == 2
    assert re.search(r"was trained on data with fingerprint [0-9a-f]+, not [0-9a-f]+", ended.error_line)


@pytest.fixture
def read_only(images: Path) -> Iterator[Path]:
    """The images without write permission, even for root if a file system can be mounted."""
    mounted = not subprocess.run(["mount", "--bind", str(images), str(images)], capture_output=True, check=False).returncode
    if mounted:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(images)], check=True)
    else:
        subprocess.run(["chmod", "-R", "a-w", str(images)], check=True)
    yield images
    subprocess.run(["umount", str(images)] if mounted else ["chmod", "-R", "u+w", str(images)], check=True)


def test_read_only_data(method: str, arguments_of: ArgumentsOf, run: Path, read_only: Path, tried: Callable[..., Any]) -> None:
    if os.geteuid() != 0 or subprocess.run(["mountpoint", "-q", str(read_only)], check=False).returncode == 0:
        with pytest.raises(OSError, match=r"Read-only|denied"):
            (read_only / "cat" / "new").touch()
    arguments = with_images(arguments_of, method, read_only)
    with tried("read-only data", method):
        trained(*arguments)
        assert len(RunFolder(run).checkpoint_folders()) > 0


# Moved folders and clocks


def test_a_folder_that_was_moved(
    method: str,
    arguments_of: ArgumentsOf,
    run: Path,
    tmp_path: Path,
    unbroken: Callable[[str], Path],
    tried: Callable[..., Any],
) -> None:
    arguments = arguments_of(method)
    with tried("folder moved", method):
        stopped(arguments, run)
        moved = tmp_path / "elsewhere" / "renamed"
        moved.parent.mkdir()
        shutil.move(run, moved)
        trained(*arguments, "--out", moved)
        assert_same(moved, unbroken(method))
        assert not run.exists()


def test_a_clock_that_was_set_back(
    method: str, arguments_of: ArgumentsOf, run: Path, unbroken: Callable[[str], Path], tried: Callable[..., Any]
) -> None:
    """The run's files are from the future, and time runs backwards while it continues."""
    arguments = arguments_of(method)
    with tried("clock set back", method):
        stopped(arguments, run)
        for path in [run, *run.rglob("*")]:
            os.utime(path, (time.time() + 86400, time.time() + 86400))
        trained(*arguments, faults={"clock_back": {}})
        assert_same(run, unbroken(method))

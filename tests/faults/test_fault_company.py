"""Two processes on one folder, locks of dead ones, moved folders, read-only data, clocks that run backwards."""

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

Words = Callable[..., list[str | Path]]


def stopped(words: list[str | Path], run: Path) -> None:
    """Train up to the fifth step of six, and have it saved."""
    with in_a_step(words, run, 5) as process:
        process.send_signal(signal.SIGTERM)
    assert end(process).status == 143


# Two processes


def test_the_second_refuses_and_names_the_first(
    method: str, words: Words, run: Path, unbroken: Callable[[str], Path], tried: Callable[..., Any]
) -> None:
    own = words(method)
    with tried("two processes on one run folder", method):
        with in_a_step(own, run, 5) as first:
            for _ in range(2):  # the refused one leaves the lock as it found it
                second = advmoe(*own)
                assert second.status == 2, second.said
                assert str(run) in second.complaint
                assert re.search(rf"\b{first.pid}\b", second.complaint), second.complaint
                assert socket.gethostname() in second.complaint
        assert end(first).status == 0
        assert_same(run, unbroken(method))


def test_a_dead_processes_lock_is_taken_over(
    method: str, words: Words, run: Path, unbroken: Callable[[str], Path], tried: Callable[..., Any]
) -> None:
    own = words(method)
    with tried("stale lock of a dead process", method):
        with in_a_step([*own, *ALWAYS], run, 5) as first:
            first.kill()
            end(first)
        assert (run / LOCK).exists()
        ended = trained(*own)
        assert ended.error == ""
        assert not re.search(rf"{LOCK}|\b{first.pid}\b", ended.said)
        assert_same(run, unbroken(method))


def test_a_lock_that_names_a_living_stranger_is_taken_over(words: Words, run: Path, unbroken: Callable[[str], Path]) -> None:
    """The dead process's number may have been given to another one since."""
    run.mkdir()
    (run / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert trained(*words("advmoe")).error == ""
    assert_same(run, unbroken("advmoe"))


# Data


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with 32 images of two classes."""
    place, draw = tmp_path / "images", np.random.default_rng(0)
    for name in ("cat", "dog"):
        (place / name).mkdir(parents=True)
        for number in range(16):
            Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(place / name / f"{number}.png")
    return place


def own_images(words: Words, method: str, place: Path) -> list[str | Path]:
    return [*words(method, dataset="folder", limit_train=None, limit_test=None, batch_size=5, data_dir=None), "--data-dir", place]


def test_a_file_that_changes_before_a_resume(method: str, words: Words, run: Path, images: Path, tried: Callable[..., Any]) -> None:
    own = own_images(words, method, images)
    with tried("data changed before a resume", method):
        stopped(own, run)
        before = RunFolder(run).latest()
        assert before is not None
        Image.new("RGB", (12, 12), (1, 2, 3)).save(images / "cat" / "3.png")
        ended = advmoe(*own)
        assert ended.status == 2
        found = re.fullmatch(
            r"advmoe: error: .*: was trained on data with fingerprint ([0-9a-f]+), not ([0-9a-f]+)", ended.complaint
        )
        assert found, ended.complaint
        assert found[1] == before.fingerprint != found[2]


def streamed_images(place: Path) -> Path:
    """ImageNet's form: 3 classes of 8 and 2 images."""
    draw = np.random.default_rng(0)
    for part, each in (("train", 8), ("val", 2)):
        for name in ("n01", "n02", "n03"):
            (place / part / name).mkdir(parents=True)
            for number in range(each):
                image = Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((64, 64))
                image.save(place / part / name / f"{number}.JPEG")
    return place


def test_a_file_that_changes_between_epochs(
    method: str, words: Words, run: Path, tmp_path: Path, tried: Callable[..., Any]
) -> None:
    place = streamed_images(tmp_path / "imagenet")
    own = [
        *words(method, dataset="imagenet", stem="imagenet", limit_train=None, limit_test=None, batch_size=6, workers=1, width=2),
        "--data-dir", place,
    ]  # fmt: skip
    with tried("a data file changed between epochs", method):
        with in_a_step(own, run, 2) as process:  # the first epoch's
            for path in place.rglob("*.JPEG"):
                path.write_bytes(path.read_bytes())
        ended = end(process)
        assert ended.status == 2, ended.said
        time_ = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9} UTC"
        changed = rf"\.JPEG: changed since the run began \(modified at {time_}, before at {time_}\)"
        assert re.search(changed, ended.complaint), ended.complaint


def test_a_longer_file_before_a_resume_of_streamed_data(words: Words, run: Path, tmp_path: Path) -> None:
    place = streamed_images(tmp_path / "imagenet")
    own = [
        *words("at_moe", dataset="imagenet", stem="imagenet", limit_train=None, limit_test=None, batch_size=6, workers=1, width=2),
        "--data-dir", place,
    ]  # fmt: skip
    stopped(own, run)
    path = place / "train" / "n02" / "3.JPEG"
    path.write_bytes(path.read_bytes() + b"more")
    ended = advmoe(*own)
    assert ended.status == 2
    assert re.search(r"was trained on data with fingerprint [0-9a-f]+, not [0-9a-f]+", ended.complaint)


@pytest.fixture
def read_only(images: Path) -> Iterator[Path]:
    """The images where nobody may write: not even root, where a file system may be mounted."""
    mounted = not subprocess.run(["mount", "--bind", str(images), str(images)], capture_output=True, check=False).returncode
    if mounted:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(images)], check=True)
    else:
        subprocess.run(["chmod", "-R", "a-w", str(images)], check=True)
    yield images
    subprocess.run(["umount", str(images)] if mounted else ["chmod", "-R", "u+w", str(images)], check=True)


def test_read_only_data(method: str, words: Words, run: Path, read_only: Path, tried: Callable[..., Any]) -> None:
    if os.geteuid() != 0 or subprocess.run(["mountpoint", "-q", str(read_only)], check=False).returncode == 0:
        with pytest.raises(OSError, match=r"Read-only|denied"):
            (read_only / "cat" / "new").touch()
    own = own_images(words, method, read_only)
    with tried("read-only data", method):
        trained(*own)
        assert len(RunFolder(run).epochs()) > 0


# Places and clocks


def test_a_folder_that_was_moved(
    method: str, words: Words, run: Path, tmp_path: Path, unbroken: Callable[[str], Path], tried: Callable[..., Any]
) -> None:
    own = words(method)
    with tried("folder moved", method):
        stopped(own, run)
        there = tmp_path / "elsewhere" / "renamed"
        there.parent.mkdir()
        shutil.move(run, there)
        trained(*own, "--out", there)
        assert_same(there, unbroken(method))
        assert not run.exists()


def test_a_clock_that_was_set_back(
    method: str, words: Words, run: Path, unbroken: Callable[[str], Path], tried: Callable[..., Any]
) -> None:
    """What the run wrote so far is from the future then, and time goes backwards while it goes on."""
    own = words(method)
    with tried("clock set back", method):
        stopped(own, run)
        for path in [run, *run.rglob("*")]:
            os.utime(path, (time.time() + 86400, time.time() + 86400))
        trained(*own, faults={"clock_back": {}})
        assert_same(run, unbroken(method))

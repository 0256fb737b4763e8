"""A full disk during a checkpoint: the previous one stays, one line reports it, and the run continues when there is space."""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fault_runs import Ended, advmoe, assert_same, drafts, end, in_a_step, trained

from advmoe.training.checkpoint import RunFolder

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

PLENTY = 64 * 2**20
Words = Callable[..., list[str | Path]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small_disk(size): a file system in memory of so many bytes, made larger where it is there; skips where none can be made."""
    place = tmp_path / "disk"

    def sized(size: int) -> Path:
        words = ["-o", f"remount,size={size}"] if place.exists() else ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
        place.mkdir(exist_ok=True)
        if subprocess.run(["mount", *words, str(place)], capture_output=True, check=False).returncode:
            pytest.skip("no file system may be mounted here: the limit on the size of files stands in for it")
        return place

    yield sized
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def assert_told(ended: Ended, run: Path, epoch: int) -> None:
    """One line names the checkpoint that did not fit, and all existing checkpoints are complete."""
    assert ended.status == 2, ended.said
    assert ended.complaint.startswith(f"advmoe: error: {run / 'checkpoints' / f'epoch-{epoch:04d}'}: ")
    assert drafts(run) == []
    assert RunFolder(run).damaged() == []


def test_full_disk(
    method: str, words: Words, small_disk: Callable[[int], Path], unbroken: Callable[[str], Path], tried: Callable[..., Any]
) -> None:
    """In the second epoch the disk has room for half of the weights alone."""
    wanted = unbroken(method)
    disk = small_disk(PLENTY)
    run = disk / "run"
    own = [*words(method), "--out", run]
    with tried("disk full (tmpfs)", method):
        with in_a_step(own, run, 5) as process:
            weights = (run / "checkpoints" / "epoch-0001" / "model.safetensors").stat().st_size
            small_disk(shutil.disk_usage(disk).used + weights // 2)
        ended = end(process)
        assert_told(ended, run, 2)
        assert "space" in ended.complaint
        latest = RunFolder(run).latest()
        assert latest is not None
        assert latest.epoch == 1
        assert_told(advmoe(*own), run, 2)  # and again, as long as there is no room
        small_disk(PLENTY)
        trained(*own)
        assert_same(run, wanted)


def test_no_disk_space_at_all(small_disk: Callable[[int], Path], words: Words) -> None:
    disk = small_disk(16384)
    (disk / "filler").write_bytes(bytes(8192))
    with pytest.raises(OSError, match="No space left"):
        (disk / "more").write_bytes(bytes(16384))
    ended = advmoe(*words("advmoe"), "--out", disk / "run")
    assert ended.status == 2
    assert "space" in ended.complaint


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file that this process, or one that it starts, writes may grow larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_that_may_not_grow(
    method: str, words: Words, run: Path, unbroken: Callable[[str], Path], tried: Callable[..., Any]
) -> None:
    """A quota, which needs no rights: every write past a size fails."""
    wanted, own = unbroken(method), words(method)
    shutil.copytree(wanted, run)
    last = RunFolder(run).epochs()[-1]
    size = os.path.getsize(last / "model.safetensors")
    shutil.rmtree(last)
    with tried("file size limit while saving", method):
        with largest_file(size // 2):
            ended = advmoe(*own)
        assert_told(ended, run, int(last.name[-4:]))
        trained(*own)
        assert_same(run, wanted)

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
ArgumentsOf = Callable[..., list[str | Path]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small_disk(size): mount a file system of `size` bytes in memory, or resize it; skips the test if that is not allowed."""
    disk = tmp_path / "disk"

    def sized(size: int) -> Path:
        options = ["-o", f"remount,size={size}"] if disk.exists() else ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
        disk.mkdir(exist_ok=True)
        if subprocess.run(["mount", *options, str(disk)], capture_output=True, check=False).returncode:
            pytest.skip("no file system may be mounted here: the limit on the size of files stands in for it")
        return disk

    yield sized
    subprocess.run(["umount", str(disk)], capture_output=True, check=False)


def assert_reported(ended: Ended, run: Path, epoch: int) -> None:
    """One error line names the checkpoint that did not fit, and all existing checkpoints are complete."""
    assert ended.status == 2, ended.text
    assert ended.error_line.startswith(f"advmoe: error: {run / 'checkpoints' / f'epoch-{epoch:04d}'}: ")
    assert drafts(run) == []
    assert RunFolder(run).damaged() == []


def test_full_disk(
    method: str,
    arguments_of: ArgumentsOf,
    small_disk: Callable[[int], Path],
    unbroken: Callable[[str], Path],
    tried: Callable[..., Any],
) -> None:
    """In the second epoch the disk has space for only half of the weights."""
    expected = unbroken(method)
    disk = small_disk(PLENTY)
    run = disk / "run"
    arguments = [*arguments_of(method), "--out", run]
    with tried("disk full (tmpfs)", method):
        with in_a_step(arguments, run, 5) as process:
            weights = (run / "checkpoints" / "epoch-0001" / "model.safetensors").stat().st_size
            small_disk(shutil.disk_usage(disk).used + weights // 2)
        ended = end(process)
        assert_reported(ended, run, 2)
        assert "space" in ended.error_line
        latest = RunFolder(run).latest()
        assert latest is not None
        assert latest.epoch == 1
        assert_reported(advmoe(*arguments), run, 2)  # and again, as long as there is no space
        small_disk(PLENTY)
        trained(*arguments)
        assert_same(run, expected)


def test_no_disk_space_at_all(small_disk: Callable[[int], Path], arguments_of: ArgumentsOf) -> None:
    disk = small_disk(16384)
    (disk / "filler").write_bytes(bytes(8192))
    with pytest.raises(OSError, match="No space left"):
        (disk / "more").write_bytes(bytes(16384))
    ended = advmoe(*arguments_of("advmoe"), "--out", disk / "run")
    assert ended.status == 2
    assert "space" in ended.error_line


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files that this process and those it starts may write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_that_may_not_grow(
    method: str, arguments_of: ArgumentsOf, run: Path, unbroken: Callable[[str], Path], tried: Callable[..., Any]
) -> None:
    """A limit on the size of files, which needs no permissions."""
    expected, arguments = unbroken(method), arguments_of(method)
    shutil.copytree(expected, run)
    last = RunFolder(run).checkpoint_folders()[-1]
    size = os.path.getsize(last / "model.safetensors")
    shutil.rmtree(last)
    with tried("file size limit while saving", method):
        with largest_file(size // 2):
            ended = advmoe(*arguments)
        assert_reported(ended, run, int(last.name[-4:]))
        trained(*arguments)
        assert_same(run, expected)

"""Many inputs to one reader: each ends in a value or in one line, in time, in memory, and leaves everything else alone."""

import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from advmoe.errors import UserError

FEW = 60  # always the same, in every run of the tests
MANY = int(os.environ.get("FUZZ_INPUTS", "10000"))
SEED = int(os.environ.get("FUZZ_SEED", "0")) or secrets.randbits(32)
PORTION = 500  # inputs that hypothesis remembers at a time
SECONDS = 5  # of the processor, for one input
ROOM = 2**32  # bytes of address space beyond what the process has: a reader that needs more is cut off
GROWTH = 2**28  # bytes that an input may take for a moment
RUN_CODE = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "os.startfile", "subprocess.Popen", "ctypes.dlopen")
REACH_OUT = (
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "os.symlink",
    "os.link",
    "os.mkfifo",
    "os.chmod",
    "os.chown",
    "os.truncate",
)
MOVE = ("os.remove", "os.mkdir", "os.rmdir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

counts = pytest.mark.parametrize("inputs", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.fuzz)])


class Hang(BaseException):
    """An input took too long; not an Exception, so that no reader takes it for damage."""


class Watch:
    """An audit hook that reports actions outside of `inside` while it is on. Python cannot remove it again."""

    def __init__(self) -> None:
        self.inside, self.on, self.seen = "", False, list[str]()
        sys.addaudithook(self.hear)

    def hear(self, event: str, details: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in RUN_CODE or event in REACH_OUT:
            self.seen.append(f"{event} {details}")
        elif event == "os.rename":
            self._moved(event, details[0], details[2])
            self._moved(event, details[1], details[3])
        elif event in MOVE:
            self._moved(event, details[0], details[-1])
        elif event == "open" and details[2] & WRITING and isinstance(details[0], str | bytes | os.PathLike):
            self._moved(event, details[0], -1)

    def _moved(self, event: str, path: Any, folder: int) -> None:
        """A path, in the open folder of this number where it is one."""
        place = os.path.join(f"/proc/self/fd/{folder}" if folder >= 0 else "", os.fsdecode(path))
        if not os.path.realpath(place).startswith(self.inside):
            self.seen.append(f"{event} {path!r}")


WATCH = Watch()


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fails if anything is written outside of `folder`, a program is started, or a network is used."""
    WATCH.inside, WATCH.on, WATCH.seen = os.path.realpath(folder), True, []
    try:
        yield
    finally:
        WATCH.on = False
    assert not WATCH.seen, WATCH.seen


@contextmanager
def in_time() -> Iterator[None]:
    """Raises Hang after SECONDS of the processor's time."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"an input took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def in_memory() -> Iterator[None]:
    """Fails where an input takes more than GROWTH of memory for a moment."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _kibibytes("VmRSS")
    try:
        yield
    finally:
        most = _kibibytes("VmHWM") - before
    assert most * 1024 < GROWTH


@contextmanager
def in_room() -> Iterator[None]:
    """No more address space than ROOM beyond what the process has: what would fill the machine's memory fails by itself."""
    limits, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _kibibytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


def read(reader: Callable[[], Any]) -> Any:
    """What a reader gives, or the UserError in which it ends: one line of printable text that is not too long."""
    try:
        return reader()
    except UserError as error:
        text = str(error)
        assert text.isprintable()
        assert 0 < len(text) < 2000
        return error


def drive(
    request: pytest.FixtureRequest,
    inputs: int,
    reader: str,
    strategy: SearchStrategy[Any],
    folder: Path,
    check: Callable[[Any], None],
) -> None:
    """`check` on so many inputs; it must raise nothing. A failing one is made small and printed, with the seed it came from."""
    tried, started, many = 0, time.perf_counter(), inputs != FEW

    def one(value: Any) -> None:
        nonlocal tried
        tried += 1
        with in_room(), in_memory(), in_time(), watched(folder):
            check(value)

    limits = settings(
        max_examples=min(inputs, PORTION), derandomize=not many, deadline=None, database=None, print_blob=False,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    test = limits(given(strategy)(one))
    failures = 1
    try:
        print(f"{reader}: {inputs} inputs" + (f", FUZZ_SEED={SEED}" if many else ""))
        for portion in range(-(-inputs // PORTION)):
            (seed(SEED + portion)(test) if many else test)()
        failures = 0
    finally:
        seconds = round(time.perf_counter() - started, 1)
        row = {"reader": reader, "inputs": tried, "seconds": seconds, "failures": failures, "seed": SEED}
        if many:
            request.node.user_properties.append(("fuzz", row))

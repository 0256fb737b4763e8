"""Many inputs to one reader: each gives a value or an error of one line, in bounded time and memory, without other effects."""

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

FEW = 60  # the same in every run of the tests
MANY = int(os.environ.get("FUZZ_INPUTS", "10000"))
SEED = int(os.environ.get("FUZZ_SEED", "0")) or secrets.randbits(32)
CHUNK = 500  # inputs that hypothesis remembers at a time
SECONDS = 5  # of processor time for one input
ADDRESS_SPACE = 2**32  # bytes beyond what the process has: a reader that needs more gets a MemoryError
GROWTH = 2**28  # bytes of memory that an input may take at its peak
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
    """An input took too long; not an Exception, so that no reader catches it."""


class Watch:
    """An audit hook that records forbidden actions outside of the folder `inside` while it is on. Python cannot remove a hook."""

    def __init__(self) -> None:
        self.inside, self.on, self.violations = "", False, list[str]()
        sys.addaudithook(self.audit)

    def audit(self, event: str, details: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in RUN_CODE or event in REACH_OUT:
            self.violations.append(f"{event} {details}")
        elif event == "os.rename":
            self._check_path(event, details[0], details[2])
            self._check_path(event, details[1], details[3])
        elif event in MOVE:
            self._check_path(event, details[0], details[-1])
        elif event == "open" and details[2] & WRITING and isinstance(details[0], str | bytes | os.PathLike):
            self._check_path(event, details[0], -1)

    def _check_path(self, event: str, path: Any, folder: int) -> None:
        """Record a path outside; `folder` is the descriptor of the folder that it is relative to, or -1."""
        full_path = os.path.join(f"/proc/self/fd/{folder}" if folder >= 0 else "", os.fsdecode(path))
        if not os.path.realpath(full_path).startswith(self.inside):
            self.violations.append(f"{event} {path!r}")


WATCH = Watch()


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fails if anything is written outside of `folder`, a program is started, or a network is used."""
    WATCH.inside, WATCH.on, WATCH.violations = os.path.realpath(folder), True, []
    try:
        yield
    finally:
        WATCH.on = False
    assert not WATCH.violations, WATCH.violations


@contextmanager
def in_time() -> Iterator[None]:
    """Raises Hang after SECONDS of processor time."""

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
    """Fails if an input takes more than GROWTH of memory at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _kibibytes("VmRSS")
    try:
        yield
    finally:
        most = _kibibytes("VmHWM") - before
    assert most * 1024 < GROWTH


@contextmanager
def in_address_space() -> Iterator[None]:
    """Limits the address space, so that a reader cannot fill the machine's memory."""
    limits, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_SPACE, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _kibibytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


def read(reader: Callable[[], Any]) -> Any:
    """The result of a reader, or the UserError it raises, which must be one printable line of bounded length."""
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
    """Call `check` with many inputs; it must not raise. Hypothesis minimizes and prints a failing input with its seed."""
    tried, started, many = 0, time.perf_counter(), inputs != FEW

    def check_one(value: Any) -> None:
        nonlocal tried
        tried += 1
        with in_address_space(), in_memory(), in_time(), watched(folder):
            check(value)

    limits = settings(
        max_examples=min(inputs, CHUNK), derandomize=not many, deadline=None, database=None, print_blob=False,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    test = limits(given(strategy)(check_one))
    failures = 1
    try:
        print(f"{reader}: {inputs} inputs" + (f", FUZZ_SEED={SEED}" if many else ""))
        for chunk in range(-(-inputs // CHUNK)):
            (seed(SEED + chunk)(test) if many else test)()
        failures = 0
    finally:
        seconds = round(time.perf_counter() - started, 1)
        row = {"reader": reader, "inputs": tried, "seconds": seconds, "failures": failures, "seed": SEED}
        if many:
            request.node.user_properties.append(("fuzz", row))

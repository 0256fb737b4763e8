"""Signals that ask a run to end: noted at once, heeded after the step in hand."""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Training ended by the signal `number`; says where and what was saved."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class Interrupts:
    """Catches SIGINT and SIGTERM inside a `with`; the same one twice ends the process without waiting for the step.

    Signals that whoever started this process wants ignored stay ignored; outside the main thread nothing is caught.
    """

    def __init__(self) -> None:
        self.caught = 0  # number of the first signal, 0 before it
        self._before: dict[int, object] = {}
        self._seen: set[int] = set()
        self._process = os.getpid()

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # as signal.signal gave it

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that decodes images, which ends with this one
            return
        if number in self._seen:
            signal.signal(number, signal.SIG_IGN)
            raise Stopped(number, "at once; the last checkpoint is whole")
        self._seen.add(number)
        self.caught = self.caught or number
        text = f"{signal.Signals(number).name}: finishing the step in hand, then saving; once more ends at once\n"
        with contextlib.suppress(OSError):  # a pipe whose reader the signal ended, too
            os.write(2, text.encode())  # print could be what the signal interrupts

"""Signals that end a run. They are recorded at once; the run ends after the current step."""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The signal `number` ended the training. The message says what was saved, and where."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class Interrupts:
    """Catches SIGINT and SIGTERM inside a `with` block. A second SIGINT raises Stopped without waiting for the step.

    A second SIGTERM changes nothing: a service manager and the process of a sweep may both send one for a single request.
    A signal that the process was started to ignore stays ignored. Outside the main thread no signal is caught.
    """

    def __init__(self) -> None:
        self.caught = 0  # number of the first signal, 0 before it
        self._old_handlers: dict[int, object] = {}
        self._received: set[int] = set()
        self._process = os.getpid()

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # as signal.signal returned it

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that decodes images; it ends with its parent
            return
        if number in self._received:
            if number == signal.SIGTERM:
                return
            signal.signal(number, signal.SIG_IGN)
            raise Stopped(number, "at once; the last checkpoint is complete")
        self._received.add(number)
        self.caught = self.caught or number
        again = "; send it again to end at once" if number == signal.SIGINT else ""
        text = f"{signal.Signals(number).name}: finishing the current step, then saving{again}\n"
        with contextlib.suppress(OSError):  # the reader of a pipe may have ended by the same signal
            os.write(2, text.encode())  # not print: the signal may have interrupted a print

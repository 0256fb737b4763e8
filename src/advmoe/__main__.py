"""`python -m advmoe` and the `advmoe` command."""

import os
import signal
import sys
from types import FrameType

from advmoe.cli.streams import PIPE_CLOSED, discard_output, open_missing
from advmoe.libraries import tune_libraries


def run() -> None:
    """Run the command line; an interrupt ends it quietly even while torch is being loaded."""
    open_missing()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the parent process has chosen to ignore interrupts
        signal.signal(signal.SIGINT, _interrupt_once)
    tune_libraries()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read as torch loads: threads that wait soon sleep, so others can run
    status = 0
    try:
        from advmoe.cli.main import main  # noqa: PLC0415

        try:
            status = main()
        finally:
            sys.stdout.flush()  # also if --help raised SystemExit
        raise SystemExit(status)
    except BrokenPipeError:
        discard_output()
        raise SystemExit(PIPE_CLOSED) from None
    except OSError as error:
        discard_output()
        if status == 0:  # else `main` has said what is wrong
            print(f"advmoe: error: standard output: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(status or 2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Let the first interrupt end the command, and ignore further ones, which would cut short its cleanup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # unlike a handler function, this is valid until the interpreter exits
    raise KeyboardInterrupt


if __name__ == "__main__":
    run()

"""A Python for the processes that tests start: it knows the small backbone and takes a quick snapshot, as the tests do.

`small_python.py EXECUTABLE -m MODULE ...` and `... -c CODE ...` run like Python's. The process starts others by EXECUTABLE. The
fixture `small_processes` makes an executable of it.

The environment variable PAUSE_AT is the end of a path. The process waits for a signal once it has written that file or checkpoint,
so that a test can kill it there, however slow the machine is.
"""

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import small_backbone
import torch

QUICK_SNAPSHOT = {  # for a Record's snapshot, which would take most of a tiny evaluation's time
    "GALLERY_ATTACK": "pgd_10", "GALLERY_STEPS": (0.5,), "CURVE_EPSILONS": (0.0, 1.0),
}  # fmt: skip


def skip_compiler() -> None:
    """Replace torch._dynamo, which every optimizer imports although only torch.compile needs it: it takes a second."""
    compiler = ModuleType("torch._dynamo")
    compiler.disable = lambda function, *_, **__: function
    compiler.graph_break = lambda: None
    sys.modules[compiler.__name__] = torch._dynamo = compiler


def pause_at(ending: str) -> None:
    """Wait for a signal after a file or folder has got a path with this ending. Drafts get theirs when they are complete."""

    def pausing(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def move_and_pause(draft: Path, target: Path) -> Path:
            moved = move(draft, target)
            if str(target).endswith(ending):
                signal.pause()
            return moved

        return move_and_pause

    patch.multiple(Path, rename=pausing(Path.rename), replace=pausing(Path.replace)).start()


if __name__ == "__main__":
    skip_compiler()
    if "PAUSE_AT" in os.environ:
        pause_at(os.environ["PAUSE_AT"])
    small_backbone.register()
    patch.multiple("advmoe.evaluation.snapshot", **QUICK_SNAPSHOT).start()
    sys.executable, option, program, *arguments = sys.argv[1:]
    sys.argv = [option, *arguments]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(program, {"__name__": "__main__"})

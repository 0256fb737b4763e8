"""Runs the command that argv names. Errors become one line and an exit status."""

import errno
import importlib
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version

from advmoe import __version__, extension
from advmoe.cli.streams import escape_unencodable, warnings_on_stderr
from advmoe.errors import UserError, lookup, printable
from advmoe.training.interrupts import Stopped

COMMANDS = {  # each is a module of advmoe.cli.arguments and one of advmoe.cli, imported when it is used
    "demo": "Train and evaluate four methods and a control on images that come with the package (about 20 minutes).",
    "train": "Train a network from a recipe or a configuration file, or continue a run that was stopped.",
    "evaluate": "Attack a trained network on the test set: clean, robust and worst-case accuracy.",
    "models": "List the networks that come with the package.",
    "predict": "Classify images: class, confidence and the expert of each layer.",
    "attack": "Search for the smallest change of one image that fools a network.",
    "export": "Write a trained network as one ONNX or torch.export file, and compare it with PyTorch.",
    "sweep": "Train and evaluate every run of a table or figure of the paper, or of a sweep file; continue a stopped sweep.",
    "watch": "Show running and finished runs.",
    "report": "Write tables, figures and one self-contained HTML page from Records.",
    "benchmark": "Measure whether networks, training and attacks are as fast as their GMACs suggest.",
    "profile": "Print the number of parameters and the GMACs (cost of one image) of a recipe's network.",
    "recipes": "List the recipes: settings, parameters and GMACs.",
    "data": "Download a data set (get), or read one and print what it contains (check).",
    "doctor": "List what is installed and what is missing, with the command that installs it.",
    "completion": "Print the script that completes commands and flags in a shell.",
}
OUT_OF_MEMORY = "out of memory: use a smaller --batch-size or a smaller network"
WORKER_KILLED = "a process that decodes images was killed, perhaps because memory ran out; fewer --workers need less"
SAME_COMMAND = "the same command continues where it stopped"
HOW_TO_CONTINUE = {
    "train": "the same command with --resume continues from the last checkpoint",
    "evaluate": "the same command (without --fresh) continues where it stopped",
    "demo": SAME_COMMAND,
    "sweep": SAME_COMMAND,
    "report": "every written file is complete; the same command writes the others",
    "data": SAME_COMMAND,
    "benchmark": "with --json, the rows that were measured are in its file, if there are any",
    "export": "if the file was written, it is complete, but it was not compared with PyTorch",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    extension.announce(sys._getframe(1))
    escape_unencodable()
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"advmoe {__version__}, torch {version('torch')}")
        return 0
    try:
        lookup(COMMANDS, argv[0], "command")
        with warnings_on_stderr():
            extension.load()
            extension.check_names()
            arguments = importlib.import_module("advmoe.cli.parsing").read(argv[0], argv[1:])
            importlib.import_module(f"advmoe.cli.{argv[0]}").run(arguments)
        return 0
    except BrokenPipeError:  # the reader of the output has ended, as after `| head`: `advmoe.__main__` exits quietly
        raise
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = _message(error, argv[0])
        if message is None:
            raise
        print(f"advmoe: error: {printable(' '.join(message.splitlines()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        position = f" {error}" if isinstance(error, Stopped) else ""
        print(f"interrupted{position}; {HOW_TO_CONTINUE.get(argv[0], 'nothing was changed')}", file=sys.stderr)
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)


def _overview() -> str:
    lines = ["usage: advmoe COMMAND ...    (advmoe COMMAND --help lists its flags, advmoe --version the versions)", ""]
    lines += [f"  {name:10} {summary}" for name, summary in COMMANDS.items()]
    return "\n".join([*lines, "", "Start with: advmoe demo"])


def _message(error: BaseException, command: str) -> str | None:
    """The message for the user; None for a bug, whose traceback is needed."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it for --help
        return OUT_OF_MEMORY
    if isinstance(error, RuntimeError):
        if "DefaultCPUAllocator" in str(error):  # torch's error on the CPU has no class of its own
            return OUT_OF_MEMORY
        return f"{WORKER_KILLED} ({error})" if str(error).startswith("DataLoader worker") else None
    if not isinstance(error, OSError):
        return str(error)
    file = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{file}no space left on the disk" + (f"; {HOW_TO_CONTINUE[command]}" if command in HOW_TO_CONTINUE else "")
    return f"{file}{error.strerror or error}"

"""A user's script that registers backbones, data sets or methods and then calls the command line. Worker processes load it, too."""

import importlib
import os
import runpy
import shlex
import sys
from pathlib import Path
from types import FrameType

from advmoe.errors import UserError

VARIABLE = "ADVMOE_EXTENSION"  # path of the script
TABLES = {  # that a script adds to, and their modules
    "DATASETS": "advmoe.data", "MODELS": "advmoe.models", "METHODS": "advmoe.training.methods", "GATES": "advmoe.moe",
    "LOSSES": "advmoe.training.losses", "ATTACKS": "advmoe.attacks.registry",
}  # fmt: skip
PACKAGE = Path(__file__).parent


def announce(caller: FrameType) -> None:
    """Pass the path of the script to child processes, if `caller` is the top level of a script outside this package."""
    file = caller.f_globals.get("__file__")
    if caller.f_globals.get("__name__") == "__main__" and file and PACKAGE not in Path(file).resolve().parents:
        os.environ[VARIABLE] = str(Path(file).resolve())


def command() -> str:
    """What a user types for `advmoe`: with a script that calls the command line, the script."""
    path, called = os.environ.get(VARIABLE), sys.argv[0]
    return f"python {shlex.quote(called)}" if path and Path(called).resolve() == Path(path).resolve() else "advmoe"


def load() -> None:
    """Run the script whose path a parent process passed, without its part under `if __name__ == "__main__"`. Raises UserError."""
    path = os.environ.get(VARIABLE)
    main_file = getattr(sys.modules["__main__"], "__file__", None)
    if path is None or path in _loaded or (main_file and Path(main_file).resolve() == Path(path)):
        return
    _loaded.add(path)
    if not Path(path).is_file():
        raise UserError(f"{VARIABLE}: no such file {path}")
    sys.path.insert(0, str(Path(path).parent))  # as Python does for a script
    runpy.run_path(path, run_name="advmoe_extension")


def check_names() -> None:
    """Raises UserError if a script replaced an entry of the package: Records and reports would take the one for the other."""
    if VARIABLE not in os.environ:
        return
    for table, module in TABLES.items():
        entries = getattr(importlib.import_module(module), table)
        for name in entries.replaced:
            raise UserError(f"{os.environ[VARIABLE]}: {table} has '{name}' already; give your entry another name")


_loaded: set[str] = set()

"""The networks that come with the package.

Each is NAME.safetensors (float16 weights), NAME.record.json (its Record, without test images) and NAME.md (its model card).
scripts/package_network.py makes them from a run. `advmoe.load(NAME)` and the commands take their names.
"""

from pathlib import Path

from advmoe.errors import UserError

FOLDER = Path(__file__).parent
RECORDED = ".record.json"
MAX_FILE = 4_000_000  # bytes
HOW_TO_INSTALL = (
    "install advmoe from a release wheel or from a checkout that holds src/advmoe/networks, "
    "or train one: advmoe train --recipe demo-advmoe --out runs/first"
)


def names() -> list[str]:
    """The networks' names, in alphabetical order."""
    return sorted(path.name.removesuffix(RECORDED) for path in FOLDER.glob(f"*{RECORDED}"))


def weights(name: str) -> Path:
    """Path of the network's weights, whether they are installed or not."""
    return FOLDER / f"{name}.safetensors"


def record_file(name: str) -> Path:
    """Path of the network's Record."""
    return FOLDER / f"{name}{RECORDED}"


def find(name: str) -> Path | None:
    """Path of the weights of the network `name`; None if the package knows no such network. Raises UserError if they are not
    installed."""
    if name not in names():
        return None
    path = weights(name)
    if not path.is_file():
        raise UserError(f"{name}: its weights are not part of this installation: {HOW_TO_INSTALL}")
    return path


def in_words() -> str:
    """The names of the networks, or how to install them, for an error message."""
    known = names()
    return f"it has {', '.join(known)}" if known else f"this installation has none: {HOW_TO_INSTALL}"

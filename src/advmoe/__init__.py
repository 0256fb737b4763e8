"""AdvMoE: robust mixture-of-experts training for convolutional networks, and an evaluation that can be trusted."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from advmoe.moved import getter
from advmoe.version import __version__ as __version__

if TYPE_CHECKING:
    from advmoe.publish import push_to_hub
    from advmoe.runs.load import from_pretrained, load, save_file
    from advmoe.runs.loaded import Loaded

__all__ = ["Loaded", "from_pretrained", "load", "push_to_hub", "save_file"]
MODULES = {
    "Loaded": "advmoe.runs.loaded",
    "from_pretrained": "advmoe.runs.load",
    "load": "advmoe.runs.load",
    "push_to_hub": "advmoe.publish",
    "save_file": "advmoe.runs.load",
}


def __getattr__(name: str) -> Any:
    """Import the names in `__all__` when they are first used (PEP 562), so that `import advmoe` is fast."""
    if name in MODULES:
        return getattr(import_module(MODULES[name]), name)
    return getter(__name__)(name)

"""AdvMoE: robust mixture-of-experts training for convolutional networks, and an evaluation that can be trusted."""

from typing import TYPE_CHECKING

from advmoe.moved import getter
from advmoe.version import __version__ as __version__

if TYPE_CHECKING:
    from advmoe.publish import push_to_hub
    from advmoe.runs.load import from_pretrained, load, save_file
    from advmoe.runs.loaded import Loaded

__all__ = ["Loaded", "from_pretrained", "load", "push_to_hub", "save_file"]
MODULES = {  # the modules of these names, which are imported when they are first used: `import advmoe` is fast
    "Loaded": "advmoe.runs.loaded",
    "from_pretrained": "advmoe.runs.load",
    "load": "advmoe.runs.load",
    "push_to_hub": "advmoe.publish",
    "save_file": "advmoe.runs.load",
}

if not TYPE_CHECKING:
    __getattr__ = getter(__name__, MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Replace modules inside a network, and keep their modes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


def replace_modules(network: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> None:
    """Replace each submodule m of `network` by `replacement(m)`, in place. It returns m itself where nothing changes."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if (new := replacement(child)) is not child:
                setattr(parent, name, new)


@contextmanager
def kept_modes(network: nn.Module) -> Iterator[None]:
    """After the block every module is in train or eval mode as before it."""
    modes = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training

"""Replace modules inside a network."""

from collections.abc import Callable

from torch import nn


def replace_modules(network: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> None:
    """Replace each submodule m of `network` by `replacement(m)`, in place. It returns m itself where nothing changes."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if (new := replacement(child)) is not child:
                setattr(parent, name, new)

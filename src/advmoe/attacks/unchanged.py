"""Notice an attack that changes the network: every figure after it would be wrong.

Values are compared, not PyTorch's version counters, which miss what is written through `.data`. Copying and comparing them costs
less than a few passes of one image.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.errors import UserError
from advmoe.moe.copies import copied

MAX_NAMES = 3  # in a message


class NetworkState:
    """The modules of a network with their modes (train or eval), and its parameters and buffers with copies of their values."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.modes = {module: module.training for module in network.modules()}
        self.tensors = {name: (tensor, tensor.detach().clone(), tensor.requires_grad) for name, tensor in _tensors(network)}
        self.contents = list(map(_contents, self.modes))

    def undo(self, x: Tensor) -> str:
        """What an attack did wrong to the network, which is then restored; "" if nothing.

        `requires_grad`, which changes no figure, is restored without a word. Buffers that a forward pass on x [B, C, H, W] changes
        may differ.
        """
        for tensor, _, needs_gradient in self.tensors.values():
            if tensor.requires_grad != needs_gradient and tensor.is_leaf:
                tensor.requires_grad_(needs_gradient)
        has_modes = all(module.training == mode for module, mode in self.modes.items())
        changed = self.changed()
        if has_modes and changed:
            changed -= _changed_by_forward(self.network, x)
        if has_modes and not changed:
            return ""
        self._restore()
        if not has_modes:
            return "left the network in another mode, in which it gives other logits: restore eval mode"
        names = ", ".join(sorted(changed)[:MAX_NAMES]) + (" and others" if len(changed) > MAX_NAMES else "")
        return f"changed {names} of the network: it must leave weights and running statistics as they are"

    def _restore(self) -> None:
        for module, contents in zip(self.modes, self.contents, strict=True):
            vars(module).update(contents)
        for tensor, value, _ in self.tensors.values():
            tensor.data = value
        for module, mode in self.modes.items():
            module.training = mode

    def changed(self) -> set[str]:
        """The names of the tensors that were changed, replaced, added or removed."""
        before, now = self.tensors, dict(_tensors(self.network))
        kept = {name for name, (tensor, value, _) in before.items() if now.get(name) is tensor and _is_same(tensor, value)}
        return (before.keys() | now.keys()) - kept


def _contents(module: nn.Module) -> dict[str, Any]:
    """Copies of the dictionaries of a module's parameters, buffers and modules. Modules of TorchScript have none."""
    attributes = ((name, vars(module).get(name)) for name in ("_parameters", "_buffers", "_modules"))
    return {name: dict(content) for name, content in attributes if isinstance(content, dict)}


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


def _is_same(tensor: Tensor, value: Tensor) -> bool:
    """Whether two tensors are equal. NaN equals NaN if the bits are the same."""
    if (tensor.shape, tensor.dtype, tensor.device) != (value.shape, value.dtype, value.device):
        return False
    tensor = tensor.detach()
    return torch.equal(tensor, value) or torch.equal(_bits(tensor), _bits(value))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@torch.no_grad()
def _changed_by_forward(network: nn.Module, x: Tensor) -> set[str]:
    """The names of the tensors that a forward pass changes, such as a counter of passes: no name if the network cannot be run,
    and all buffers if it cannot be copied."""
    graphs = {id(tensor): tensor.detach().clone() for _, tensor in _tensors(network) if not tensor.is_leaf}
    try:
        other: Any = copied(network, graphs)  # deepcopy does not support tensors with a graph
    except UserError:
        return {name for name, _ in network.named_buffers()}
    probe = NetworkState(other)
    try:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            other(x)
            if hasattr(other, "forward_routed"):
                other.forward_routed(x)
    except Exception:  # the attack may have broken the network in any way
        return set()
    return probe.changed()

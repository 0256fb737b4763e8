"""Checks that stop tools which do not support routed networks. Without them, these tools would write wrong graphs."""

import torch
from torch import Tensor, fx

EXPORT = "write the network by `advmoe export RUN --out FILE` (ONNX or torch.export, also int8), which keeps the routing"

TRAIN_MODE = (
    "torch.func transforms cannot update the running statistics of routers and batch norms in train mode: call model.eval()"
)


def check_call(x: Tensor, training: bool) -> None:
    """Raises RuntimeError if a tool calls an MoE layer on `x` that would make its routes constant or cannot run it."""
    if isinstance(x, fx.Proxy):
        raise RuntimeError(f"torch.fx cannot trace an MoE layer, as each image takes the path of its experts: {EXPORT}")
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(f"torch.jit.trace and the legacy torch.onnx.export would freeze the routes of one batch: {EXPORT}")
    if training and in_transform():
        raise RuntimeError(TRAIN_MODE)


def check_untransformed(what: str, instead: str) -> None:
    """Raises RuntimeError inside a torch.func transform or torch.export, which `what` does not support. `instead` names what works
    in a transform.
    """
    if in_transform():
        raise RuntimeError(f"{what} cannot run inside torch.func transforms; {instead} can")
    if torch.compiler.is_exporting():
        raise RuntimeError(f"torch.export cannot follow {what}: {EXPORT}")


def in_transform() -> bool:
    """Whether this runs inside grad, vmap, jacrev or another transform of torch.func."""
    return bool(torch._C._are_functorch_transforms_active())

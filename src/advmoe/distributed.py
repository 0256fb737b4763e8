"""Several processes that work on one run, started by torchrun: R ranks, of which only rank 0 writes.

Without torchrun there is one rank, and nothing here costs time or changes a result. All ranks must call the functions that
communicate, in the same order.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from advmoe.errors import UserError

Result = TypeVar("Result")
TIMEOUT = timedelta(days=7)  # rank 0 may work alone for hours; a rank that died is noticed at once, by its connection


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def local_world_size() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def launch_id() -> str:
    """The identifier of this torchrun; empty without torchrun.

    Without `--rdzv-id` the id of every torchrun may be 'none'. On one machine we then use torchrun's process number, which stays
    the same when torchrun starts the ranks again.
    """
    launch, machines = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("GROUP_WORLD_SIZE", "1")
    return f"{socket.gethostname()} {os.getppid()}" if (launch, machines) == ("none", "1") else launch


def restart_count() -> int:
    """How often torchrun has started the ranks again after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def local_device(device: torch.device) -> torch.device:
    """This rank's CUDA device on its machine, which becomes the current one, if `device` is CUDA without a number; else `device`.

    Raises UserError if several ranks would share the device, or if the machine has too few.
    """
    if device.type != "cuda" or not launch_id():
        return device
    if device.index is not None:
        if int(os.environ["LOCAL_WORLD_SIZE"]) > 1:
            raise UserError(f"{device} is one device for several processes: leave its number out")
        return device
    local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if local.index >= torch.cuda.device_count():
        raise UserError(f"{local} is not available: start at most {torch.cuda.device_count()} processes on this machine")
    torch.cuda.set_device(local)
    return local


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other ranks, if torchrun started several: by NCCL between CUDA devices, by gloo between CPUs. Only rank 0 logs."""
    if not launch_id() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    store, number, world = next(rendezvous("env://"))
    store = PrefixStore(f"attempt {restart_count()}", store)  # torchrun may keep the store, with addresses of ranks that died
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=TIMEOUT)
    logging.getLogger("advmoe").disabled = number > 0
    try:
        yield
        dist.barrier()  # gloo aborts a process whose peers leave first
    finally:
        dist.destroy_process_group()


def local_rows(images: int) -> slice:
    """This rank's rows of a batch of `images` images. The ranks' shares differ by one at most."""
    return slice(images * rank() // world_size(), images * (rank() + 1) // world_size())


def local_size(images: int) -> int:
    """The number of this rank's images in a batch of `images` images."""
    return len(range(images)[local_rows(images)])


class _Sum(torch.autograd.Function):
    """The sum over ranks. Every rank's loss depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)  # type: ignore[no-any-return, no-untyped-call]


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, with gradients."""
    return x if world_size() == 1 else _Sum.apply(x)  # type: ignore[no-untyped-call]


def all_gather(x: Tensor) -> Tensor:
    """[...] -> [R, ...]: every rank's tensor of that shape, with gradients."""
    slots = [x if number == rank() else torch.zeros_like(x) for number in range(world_size())]
    return sum_over_ranks(torch.stack(slots))


def gather_rows(x: Tensor) -> Tensor:
    """[b, ...] -> [B, ...]: the rows of all ranks, in their order, with gradients."""
    if world_size() == 1:
        return x
    lengths = all_gather(torch.tensor(len(x), device=x.device)).tolist()
    before = sum(lengths[: rank()])
    after = sum(lengths) - before - len(x)
    return sum_over_ranks(torch.cat([x.new_zeros(before, *x.shape[1:]), x, x.new_zeros(after, *x.shape[1:])]))


def pooled_statistics(values: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and biased variance of the values of all ranks, from those of each rank. `values`, this rank's number of
    values, is broadcast to the shape of `mean`."""
    if world_size() == 1:
        return values.to(mean.dtype).expand_as(mean), mean, var
    counts, means, variances = all_gather(torch.stack([values.to(mean.dtype).expand_as(mean), mean, var])).unbind(dim=1)
    total = counts.sum(dim=0)
    weights = counts / total.clamp(min=1)
    middle = (weights * means).sum(dim=0)
    return total, middle, (weights * (variances + (means - middle).square())).sum(dim=0)


def any_rank(flags: Tensor) -> Tensor:
    """Which flags (a bool tensor) are set on at least one rank."""
    return sum_over_ranks(flags.float()) > 0 if world_size() > 1 else flags


def maximum(number: int) -> int:
    """The largest number of any rank."""
    if world_size() == 1:
        return number
    slot = torch.tensor(number)  # on the CPU, which gloo serves beside NCCL
    dist.all_reduce(slot, dist.ReduceOp.MAX)
    return int(slot)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients by their sums over the ranks, in one message for each dtype.

    A rank without a gradient of a parameter, as of a layer that it left out, counts as 0. If no rank has one, it stays None.
    """
    if world_size() == 1:
        return
    every, by_dtype = list(parameters), dict[torch.dtype, list[Tensor]]()
    somewhere = any_rank(torch.tensor([parameter.grad is not None for parameter in every]))  # on the CPU, which gloo serves
    for parameter, learns in zip(every, somewhere.tolist(), strict=True):
        if learns:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])


def broadcast(value: Result) -> Result:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def on_rank_zero(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0, and return its result on every rank. If it raises on rank 0, rank 0 re-raises and the other ranks
    exit."""
    if world_size() == 1:
        return action()
    result: Result | None = None
    failure: BaseException | None = None
    if rank() == 0:
        try:
            result = action()
        except BaseException as error:
            failure = error
    result, failed = broadcast((result, failure is not None))
    if failed:
        raise SystemExit(2) if failure is None else failure
    return result  # type: ignore[return-value]


def barrier() -> None:
    """Wait until every rank has called this."""
    if world_size() > 1:
        dist.barrier()


def raise_together(action: Callable[[], Result]) -> Result:
    """Run `action` on every rank, and return each rank's result. If it raises UserError or OSError on some rank, rank 0 raises
    UserError with the first message and the other ranks exit."""
    if world_size() == 1:
        return action()
    result: Result | None = None
    failure = ""
    try:
        result = action()
    except (UserError, OSError) as error:
        failure = str(error) or type(error).__name__
    if maximum(bool(failure)):
        failures = [""] * world_size()
        dist.all_gather_object(failures, failure)
        raise UserError(next(filter(None, failures))) if rank() == 0 else SystemExit(2)
    return result  # type: ignore[return-value]


def broadcast_state(module: nn.Module) -> None:
    """Copy rank 0's parameters and buffers to every rank."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)

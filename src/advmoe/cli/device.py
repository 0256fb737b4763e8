"""The device that a command runs on."""

import os

import torch

from advmoe.config import ComputeConfig
from advmoe.distributed import local_device
from advmoe.errors import UserError
from advmoe.moe import check_dispatch


def set_up_device(runtime: ComputeConfig) -> torch.device:
    """Set the number of threads and deterministic operations, and return `find_device`."""
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
        torch.use_deterministic_algorithms(True)
    return find_device(runtime)


def find_device(runtime: ComputeConfig) -> torch.device:
    """The device to run on; under torchrun on CUDA it becomes the current one. Raises UserError if the device or the dispatch is
    not available."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if runtime.device == "auto" else runtime.device
    try:
        chosen = local_device(torch.device(name))
        torch.zeros(1, device=chosen).item()  # the device meta has tensors without values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if "device string" in reason:  # torch's message lists the types of all its devices
            reason = "give auto, cpu, cuda, or cuda:1 for the second CUDA device"
        raise UserError(f"device '{name}' is not available here: {reason}") from None
    check_dispatch(runtime.dispatch, chosen)
    return chosen

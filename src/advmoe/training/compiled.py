"""`--compile`: the passes of training as programs of static shapes, compiled by torch.compile or recorded as CUDA graphs.

A program is one forward pass with its backward pass. Every step of an attack and every update calls one, so that a few programs
cover almost all operators of an iteration. Nothing else of a run depends on them: parameters and checkpoints stay the same.
"""

import os
import shutil
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from advmoe import distributed
from advmoe.config import RunConfig, RuntimeConfig
from advmoe.errors import UserError
from advmoe.models import Classifier
from advmoe.moe import Gate, Routings
from advmoe.moe.dispatch import STATIC

BACKENDS = {"inductor": "inductor", "graphs": "cudagraphs"}  # names of torch.compile
MAX_PROGRAMS = 64  # of a process: one for each network, gate and set of learning parameters; torch's limit of 8 is too low

Pass = Callable[[Classifier, Tensor, Gate], tuple[Tensor, Routings]]


def direct(model: Classifier, x: Tensor, gate: Gate) -> tuple[Tensor, Routings]:
    """Logits and routings of images `x`, as `forward_routed` computes them."""
    return model.forward_routed(x, gate)


class Passes:
    """The forward passes of a run: compiled for full batches, `direct` for other sizes such as the last batch of an epoch.

    A compiled run has one process, so a full batch has `batch_size` images.
    """

    def __init__(self, config: RunConfig) -> None:
        self.mode, self.size = config.runtime.compile, config.training.batch_size

    def __call__(self, model: Classifier, x: Tensor, gate: Gate) -> tuple[Tensor, Routings]:
        run = direct if self.mode == "none" or len(x) != self.size else program(self.mode)
        return run(model, x, gate)

    def begin_update(self) -> None:
        """Allow CUDA graphs to overwrite the results of earlier passes."""
        if self.mode == "graphs":
            torch.compiler.cudagraph_mark_step_begin()


@lru_cache
def program(mode: str) -> Pass:
    """`direct`, compiled. The first call with a new kind of network or gate compiles, which takes seconds to minutes."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_PROGRAMS)
    compiled: Pass = torch.compile(direct, backend=BACKENDS[mode], dynamic=False, fullgraph=True)
    return compiled


def check_compile(runtime: RuntimeConfig, device: torch.device) -> None:
    """Raises UserError if the dispatch, `device` or the number of processes rules out the setting `compile`."""
    if runtime.compile == "none":
        return
    if runtime.dispatch not in ("auto", *STATIC):
        raise UserError(f"compile needs a dispatch of static shapes ({', '.join(STATIC)}) or auto, not {runtime.dispatch}")
    if distributed.world_size() > 1:
        raise UserError(f"compile {runtime.compile} runs in one process, not in {distributed.world_size()}")
    if runtime.compile == "graphs" and device.type != "cuda":
        raise UserError(f"compile graphs records CUDA graphs and needs a CUDA device, not {device.type}")
    if runtime.compile == "inductor" and device.type == "cpu" and not has_compiler():
        raise UserError("compile inductor needs a C++ compiler on the CPU: there is no g++ or clang++, and CXX names none")


def has_compiler() -> bool:
    """Whether torch.compile has the C++ compiler that it needs on the CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)

"""Three iterations of every method in float64, on this rank's part of the same batches: in this process, or on two ranks."""

import os
from importlib import import_module
from pathlib import Path

import torch
from small_backbone import SMALL
from torch.distributed import TCPStore
from torch.multiprocessing import start_processes

from advmoe import distributed
from advmoe.config import AttackConfig, ModelConfig, RunConfig, TrainingConfig
from advmoe.data import ImageSpec
from advmoe.moe import synchronise
from advmoe.training.ema import Ema
from advmoe.training.methods import METHODS
from advmoe.training.start import network, train_state

BATCH = 13  # not a multiple of the number of ranks
SPEC = ImageSpec(tuple("abc"), (1, 8, 8), (0.4,), (0.3,))
TRAINING = TrainingConfig(batch_size=BATCH, tied_share=0.0, router_lr=0.05, lr=0.05)
CASES = {
    **{method: (method, {}, {}) for method in ("standard", "at_dense", "at_small_dense", "at_sparse", "at_moe", "advmoe")},
    "advmoe, norms shared": ("advmoe", {"norms": "shared"}, {}),
    "at_moe, norms shared": ("at_moe", {"norms": "shared"}, {}),
    "at_moe, soft gate": ("at_moe", {}, {"router_gate": "soft"}),
    "advmoe, one router": ("advmoe", {"routers": "per_network"}, {}),
    "advmoe, a router for each stage": ("advmoe", {"routers": "per_stage"}, {}),
    "advmoe, tied": ("advmoe", {}, {"tied_share": 1.0}),
    "advmoe, pgd_at": ("advmoe", {}, {"loss": "pgd_at"}),
    "advmoe, ingredients": (
        "advmoe",
        {},
        {
            "awp": 0.01,
            "awp_routers": True,
            "ema": 0.9,
            "soft_labels": "adr",
            "runner_up_consistency": 0.5,
            "label_smoothing": 0.1,
            "router_target": "label_mod_n",
            "router_consistency": 1.0,
            "router_margin": 0.1,
            "weight_attack_gate": "straight_through",
        },
    ),
    **{f"advmoe, {term}": ("advmoe", {}, {"balance": term, "balance_weight": 0.3}) for term in ("switch", "importance", "entropy")},
}


def config(method, model, training):
    return RunConfig(
        method=method,
        seed=0,
        model=ModelConfig(backbone=SMALL, width=4).replace(**model),
        attack=AttackConfig(epsilon=0.1),
        training=TRAINING.replace(**training),
    )


def batch(number):
    generator = torch.Generator().manual_seed(number)
    x, y = torch.rand(BATCH, *SPEC.shape, generator=generator), torch.randint(0, 3, (BATCH,), generator=generator)
    rows = distributed.local_rows(BATCH)
    return x[rows].double(), y[rows]


def after_three_iterations(case):
    """Parameters and buffers, and the metrics' sums over the ranks, after three iterations of each phase."""
    settings = config(*CASES[case])
    model, values = network(settings, SPEC).double(), {}
    model.set_dispatch("split")  # auto depends on the batch size, and rounding decides the sign of a gradient that is nearly 0
    synchronise(model, distributed.world_size() > 1)
    for phase_number, phase in enumerate(METHODS[settings.method].phases):
        state = train_state(settings, model, phase)
        state.ema = Ema(model, settings.training.ema) if settings.training.ema else None
        state.draws.batch = BATCH if distributed.world_size() > 1 else None
        for iteration in range(3):
            state.draws.generator.manual_seed(iteration)
            batches = {level: batch(10 * iteration + number) for number, level in enumerate(phase.levels)}
            state.iteration = iteration
            metrics = phase.step(state, batches)
            if state.ema is not None:
                state.ema.update(model)
        values |= {f"average {name}": value for name, value in (state.ema.model.state_dict() if state.ema else {}).items()}
        values |= {f"{phase_number} {name}": distributed.sum_over_ranks(value.double()) for name, value in metrics.items()}
    return {name: tensor.detach().double() for name, tensor in {**model.state_dict(), **values}.items()}


def uneven_gradients():
    """The summed gradients of three parameters: rank 0 has one of the first, rank 1 of the second, no rank of the third."""
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (1, 2, 3)]
    mine = parameters[distributed.rank()]
    mine.grad = torch.full_like(mine, 10.0 ** (1 + distributed.rank()))
    distributed.sum_gradients(parameters)
    return [parameter.grad for parameter in parameters]


def on_two_ranks(out: Path):
    """Write the results of all cases, and `uneven_gradients`, on two ranks.

    The processes are forked, so that they need not import torch again.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a free port, as torchrun's agent keeps one
    import_module("torch._dynamo")  # which every process would import when it makes its first optimizer
    start_processes(_rank, (store.port, out), nprocs=2, start_method="fork")


def _rank(number, port, out):
    """The environment is torchrun's. One thread, because a forked process has no other."""
    names = {"TORCHELASTIC_RUN_ID": "two ranks", "RANK": str(number), "WORLD_SIZE": "2"}
    os.environ |= names | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu")):
        assert distributed.world_size() == 2
        values = {case: after_three_iterations(case) for case in CASES} | {"uneven gradients": uneven_gradients()}
        if number == 0:
            torch.save(values, out)

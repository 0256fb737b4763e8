"""One iteration of each method: (state, batches) -> metrics."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from advmoe import distributed
from advmoe.attacks import BatchDraws, frozen
from advmoe.config import RunConfig
from advmoe.models import Classifier, fused
from advmoe.models.fused import refresh
from advmoe.moe import HARD, Gate, Routings, balance, make_gate
from advmoe.training.health import Watch
from advmoe.training.losses import Forward, Loss, Outcome

Batch = tuple[Tensor, Tensor]  # pixels [B, C, H, W] float32 in [0, 1], labels [B]
# sums over the batch's images (routers', which may rest, apart); "load" is [L, N] counts, "router_entropy" [L]
Metrics = dict[str, Tensor]
ROUTED_LEVELS = ("all", "routers")  # those in which routers learn


@dataclass
class TrainState:
    """What a step works on. `optimizers` has one entry for each level that the phase learns."""

    model: Classifier
    config: RunConfig
    loss: Loss
    optimizers: dict[str, torch.optim.SGD]
    draws: BatchDraws
    autocast: torch.dtype | None
    done: float = 0.0  # share of the phase that lies behind
    watch: Watch = field(default_factory=Watch)

    @property
    def tied(self) -> bool:
        """Whether the experts are still kept equal."""
        return self.done < self.config.training.tied_share

    def share(self, images: int) -> float:
        """What so many images are of the batch that all ranks share."""
        return 1.0 if self.draws.batch is None else images / self.draws.batch

    def twin(self) -> Classifier:
        """The model as it is now, with its norms folded in: always the same network, which attacks and routers use."""
        refresh(self._twin, self.model)
        return self._twin

    @cached_property
    def _twin(self) -> Classifier:
        return fused(self.model)


def single_level(state: TrainState, batches: Mapping[str, Batch]) -> Metrics:
    """One parameter set on one batch: all of standard training, AT (Dense), AT (S-Dense), AT (MoE); each phase of AT (Sparse)."""
    training = state.config.training
    ((level, batch),) = batches.items()
    gate, attack_gate = make_gate(training.router_gate), make_gate(training.router_attack_gate)
    outcome = _update(state, level, batch, gate, attack_gate, True)
    state.watch.check()
    return _metrics(outcome, batch[1])


def two_level(state: TrainState, batches: Mapping[str, Batch]) -> Metrics:
    """AdvMoE: routers on their batch with the weights fixed, then weights on another with the routers fixed.

    The router update runs in eval mode, which leaves the backbone's running statistics untouched. While experts are
    tied it is left out: between equal experts there is nothing to choose.
    """
    training = state.config.training
    metrics: Metrics = {}
    levels = [_weight_level] if state.tied else [_router_level, _weight_level]
    for level in levels if training.level_order == "routers_first" else reversed(levels):
        metrics |= level(state, batches)
    state.watch.check()
    return metrics


def _router_level(state: TrainState, batches: Mapping[str, Batch]) -> Metrics:
    training = state.config.training
    for _ in range(training.router_steps):
        gate, attack_gate = make_gate(training.router_gate), make_gate(training.router_attack_gate)
        outcome = _update(state, "routers", batches["routers"], gate, attack_gate, False)
    images = len(batches["routers"][1])
    return {"router_loss": outcome.total.detach() * images, "router_images": outcome.total.new_full((), images)}


def _weight_level(state: TrainState, batches: Mapping[str, Batch]) -> Metrics:
    for _ in range(state.config.training.weight_steps):
        outcome = _update(state, "weights", batches["weights"], HARD, HARD, True)
    return _metrics(outcome, batches["weights"][1])


def _update(state: TrainState, level: str, batch: Batch, gate: Gate, attack_gate: Gate, train_mode: bool) -> Outcome:
    """Attack the current network on `batch`, then one optimizer step of `level`, everything else fixed."""
    x, y = batch
    config, optimizer = state.config, state.optimizers[level]
    x_adv, learner = x, state.model
    if state.loss.attack is not None or not train_mode:
        twin = state.twin()
        x_adv = _attacked(state, twin, batch, attack_gate)
        learner = state.model if train_mode else twin  # whose routers are the model's
    with _learning(state.model, optimizer):
        state.model.train(train_mode)
        outcome = state.loss.value(_forward(state, learner, gate), x, x_adv, y, config.training.beta)
        if outcome.routings and level in ROUTED_LEVELS:
            term = balance(config.training.balance, outcome.routings)
            outcome = outcome._replace(total=outcome.total + config.training.balance_weight * term)
        state.model.eval()
        state.watch.outcome(outcome, level)
        optimizer.zero_grad(set_to_none=True)
        (outcome.total * state.share(len(y))).backward()
        distributed.sum_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
        state.watch.gradients(state.model, level)
    if state.tied:
        for layer in state.model.moe_layers():
            layer.tie_gradients()
    _take_step(state, optimizer)
    return outcome


def _attacked(state: TrainState, twin: Classifier, batch: Batch, gate: Gate) -> Tensor:
    """x', or x where the loss has no attack."""
    x, y = batch
    if state.loss.attack is None:
        return x
    with frozen(twin):
        return state.loss.attack(_forward(state, twin, gate), x, y, state.config.attack, state.draws)


def _take_step(state: TrainState, optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step, unless anything seen so far is not finite; a fused step finds that out on the device."""
    if optimizer.defaults["fused"]:
        optimizer.found_inf = state.watch.failed()  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells it
    else:
        state.watch.check()
    optimizer.step()


def _forward(state: TrainState, model: Classifier, gate: Gate) -> Forward:
    def forward(x: Tensor) -> tuple[Tensor, Routings]:
        with torch.autocast(x.device.type, dtype=state.autocast, enabled=state.autocast is not None):
            return model.forward_routed(x, gate)

    return forward


@contextmanager
def _learning(model: Classifier, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Gradients for the optimizer's parameters alone."""
    learned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    fixed = [parameter for parameter in model.parameters() if id(parameter) not in learned]
    for parameter in fixed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in fixed:
            parameter.requires_grad_(True)


@torch.no_grad()
def _metrics(outcome: Outcome, y: Tensor) -> Metrics:
    metrics = {"loss": outcome.total.detach() * len(y)}
    for name in ("clean", "robust"):
        logits: Tensor | None = getattr(outcome, name)
        if logits is not None:
            metrics[f"{name}_correct"] = (logits.argmax(dim=1) == y).sum()
    if outcome.routings:
        metrics["load"] = load(outcome.routings)
        metrics["router_entropy"] = entropy(outcome.routings)
    return metrics


def entropy(routings: Routings) -> Tensor:
    """Entropy of each layer's softmax over its logits, summed over the batch: [L], in nats."""
    p = torch.stack([routing.logits for routing in routings]).softmax(dim=2)
    sums: Tensor = torch.special.entr(p).sum(dim=(1, 2))
    return sums


def load(routings: Routings) -> Tensor:
    """How many of the batch's images each expert of each layer got: [L, N]."""
    experts = torch.stack([routing.experts for routing in routings])
    numbers = torch.arange(routings[0].logits.shape[1], device=experts.device)
    return (experts[:, :, None] == numbers).sum(dim=1)

"""One iteration of each method: (state, batches) -> metrics."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from advmoe import distributed
from advmoe.attacks import BatchDraws, derive_seed, frozen, full, kl_divergence
from advmoe.config import AttackConfig, RunConfig
from advmoe.models import Classifier, fused
from advmoe.models.fused import refresh
from advmoe.moe import HARD, ForcedGate, Gate, Routings, StraightThroughGate, make_gate
from advmoe.training import awp, labels
from advmoe.training.ema import Ema
from advmoe.training.health import Watch
from advmoe.training.losses import Forward, Loss, Outcome
from advmoe.training.terms import router_terms

Batch = tuple[Tensor, Tensor]  # pixels [B, C, H, W] float32 in [0, 1], labels [B]
# sums over the batch's images (routers', which may rest, apart); "load" is [L, N] counts, "router_entropy" [L]
Metrics = dict[str, Tensor]
ROUTED_LEVELS = ("all", "routers")  # those in which routers learn
LATE_STEPS = 5  # of the training attack, with steps_ramp


@dataclass
class TrainState:
    """What a step works on. `optimizers` has one entry for each level that the phase learns.

    `done` is the share of the phase behind, `iteration` the number of the iteration in the run, from 0.
    """

    model: Classifier
    config: RunConfig
    loss: Loss
    optimizers: dict[str, torch.optim.SGD]
    draws: BatchDraws
    autocast: torch.dtype | None
    done: float = 0.0
    iteration: int = 0
    ema: Ema | None = None
    watch: Watch = field(default_factory=Watch)

    @property
    def network(self) -> Classifier:
        """The network that is evaluated and exported: the moving average, if there is one."""
        return self.model if self.ema is None else self.ema.model

    @property
    def attack(self) -> AttackConfig:
        """The training attack of this iteration."""
        attack = self.config.attack
        if attack.steps_ramp and self.done >= 1 - attack.steps_ramp:
            attack = attack.replace(num_steps=max(attack.num_steps, LATE_STEPS))
        if self.done < attack.epsilon_ramp:
            share = self.done / attack.epsilon_ramp
            size = None if attack.step_size is None or not share else share * attack.step_size
            attack = attack.replace(epsilon=share * attack.epsilon, step_size=size)
        return attack

    @property
    def tied(self) -> bool:
        """Whether the experts are still kept equal."""
        return self.done < self.config.training.tied_share

    def share(self, images: int) -> float:
        """What so many images are of the batch that all ranks share."""
        return 1.0 if self.draws.batch is None else images / self.draws.batch

    def twin(self) -> Classifier:
        """The model as it is now, with its norms folded in: always the same object. Attacks and the routers' update use it."""
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
    routers_rest = state.tied or state.iteration % training.router_every != 0
    levels = [_weight_level] if routers_rest else [_router_level, _weight_level]
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
        outcome = _update(state, "weights", batches["weights"], HARD, _weight_attack_gate(state), True)
    return _metrics(outcome, batches["weights"][1])


def _weight_attack_gate(state: TrainState) -> Gate:
    """`alternate`: hard in even iterations, straight-through in odd ones."""
    name = state.config.training.weight_attack_gate
    return StraightThroughGate() if name == "straight_through" or (name == "alternate" and state.iteration % 2) else HARD


def _update(state: TrainState, level: str, batch: Batch, gate: Gate, attack_gate: Gate, train_mode: bool) -> Outcome:
    """Attack the current network on `batch`, then one optimizer step of `level`, everything else fixed."""
    x, y = batch
    optimizer, training = state.optimizers[level], state.config.training
    x_adv, learner = x, state.model
    if state.loss.attack is not None or not train_mode:
        twin = state.twin()
        x_adv = _attacked(state, twin, batch, attack_gate)
        learner = state.model if train_mode else twin  # whose routers are the model's
    backward = partial(_backward, state, level, _forward(state, learner, gate), (x, x_adv, y), train_mode)
    with _learning(state.model, optimizer):
        if training.awp and state.done >= training.awp_from and level != "routers":
            with awp.perturbed(state.model, training.awp, backward):
                outcome = backward()
        else:
            outcome = backward()
        state.watch.gradients(state.model, level)
    if state.tied:
        for layer in state.model.moe_layers():
            layer.tie_gradients()
    _take_step(state, optimizer)
    return outcome


def _backward(state: TrainState, level: str, forward: Forward, images: tuple[Tensor, Tensor, Tensor], train_mode: bool) -> Outcome:
    """The loss of x, x' and labels, and its gradients to the parameters of `level`, summed over the ranks."""
    optimizer = state.optimizers[level]
    state.model.train(train_mode)
    outcome = _loss(state, level, forward, images)
    state.model.eval()
    state.watch.outcome(outcome, level)
    optimizer.zero_grad(set_to_none=True)
    (outcome.total * state.share(len(images[2]))).backward()
    distributed.sum_gradients(_parameters(optimizer))
    return outcome


def _loss(state: TrainState, level: str, forward: Forward, images: tuple[Tensor, Tensor, Tensor]) -> Outcome:
    """The task's loss, and where routers learn the terms that teach them; with router_loss target, routers learn by these alone."""
    (x, x_adv, y), training = images, state.config.training
    outcome = state.loss.value(forward, x, x_adv, _labels(state, x, y), training.beta)
    if training.runner_up_consistency and level != "routers":
        term = training.runner_up_consistency * _runner_up_term(state, outcome, x_adv)
        outcome = outcome._replace(total=outcome.total + term)
    if not outcome.routings or level not in ROUTED_LEVELS:
        return outcome
    task = [] if level == "routers" and training.router_loss == "target" else [outcome.total]
    return outcome._replace(total=sum(task + router_terms(training, outcome, y), outcome.total.new_zeros(())))


def _runner_up_term(state: TrainState, outcome: Outcome, x_adv: Tensor) -> Tensor:
    """KL(f(x') || f'(x')), mean over the images. f' takes the route of f, but for the runner-up expert in one layer, which is drawn
    anew in each iteration (after RT-ER, which trains experts to agree)."""
    assert outcome.robust is not None
    routings = outcome.robust_routings
    layer = derive_seed(state.config.seed, state.iteration) % len(routings)
    route = torch.stack([routing.experts for routing in routings], dim=1)
    route[:, layer] = routings[layer].logits.topk(2, dim=1).indices[:, 1]
    other, _ = _forward(state, state.model, ForcedGate(route))(x_adv)
    return kl_divergence(other, full(outcome.robust).log_softmax(dim=1)).mean()


def _labels(state: TrainState, x: Tensor, y: Tensor) -> Tensor:
    """What the loss takes as labels: [B] int64, or probabilities [B, classes] if they are smoothed or distilled."""
    training = state.config.training
    if training.soft_labels == "none" and not training.label_smoothing:
        return y
    soft = labels.smoothed(y, state.model.num_classes, training.label_smoothing)
    if training.soft_labels == "adr":
        assert state.ema is not None
        with torch.no_grad():
            soft = labels.adr(soft, y, _forward(state, state.ema.model, HARD)(x)[0], state.done)
    return soft


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _attacked(state: TrainState, twin: Classifier, batch: Batch, gate: Gate) -> Tensor:
    """x', or x where the loss has no attack."""
    x, y = batch
    if state.loss.attack is None:
        return x
    with frozen(twin):
        return state.loss.attack(_forward(state, twin, gate), x, y, state.attack, state.draws)


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
    learned = set(map(id, _parameters(optimizer)))
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

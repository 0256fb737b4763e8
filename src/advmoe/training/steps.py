"""One training iteration of each method: (state, batches) -> metrics."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe import distributed
from advmoe.attacks import BatchDraws, derive_seed, frozen, full, kl_divergence
from advmoe.config import AttackConfig, RunConfig
from advmoe.entries import check_kind
from advmoe.errors import UserError
from advmoe.models import Classifier, fused
from advmoe.models.fused import refresh
from advmoe.moe import HARD, ForcedGate, Gate, Routings, StraightThroughGate, make_gate
from advmoe.training import awp, groups, labels
from advmoe.training.compiled import Passes
from advmoe.training.distill import Teacher
from advmoe.training.ema import Ema
from advmoe.training.groups import learn_from_terms_alone
from advmoe.training.health import Watch
from advmoe.training.losses import Forward, Loss, Outcome, check_outcome
from advmoe.training.precision import in_precision
from advmoe.training.statistics import kept_statistics
from advmoe.training.terms import router_terms

Batch = tuple[Tensor, Tensor]  # pixels [B, C, H, W] float32 in [0, 1], labels [B]
# sums over the images of the batch (separately for routers, which may skip iterations); "load" [L, N] counts images,
# "router_entropy" is [L], "confusion" [C, C] counts the classes that x' are taken for
Metrics = dict[str, Tensor]


class Example(NamedTuple):
    """A batch of an update: x, x', the labels [B], and the targets of the loss: the labels, or class probabilities [B, classes]."""

    x: Tensor
    x_adv: Tensor
    y: Tensor
    targets: Tensor


ROUTED_LEVELS = ("all", "routers")  # levels in which routers learn
LATE_STEPS = 5  # steps of the training attack at the end of a phase, with steps_ramp


@dataclass
class TrainState:
    """The state that the steps of a phase change. `optimizers` has one entry for each level that the phase trains.

    `done` is the finished fraction of the phase, in [0, 1]. `iteration` is the number of the iteration in the run, from 0.
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
    teacher: Teacher | None = None
    # row numbers of each drawn batch; the key is its tensor of pixels, because a user's step may pass one level's batch to another
    rows: dict[Tensor, Tensor | None] = field(default_factory=dict)
    groups: Tensor | None = None  # [C] int64: the group of each class, with router_target `confusion`
    watch: Watch = field(default_factory=Watch)

    @property
    def network(self) -> Classifier:
        """The network that is evaluated and exported: the moving average, if there is one."""
        return self.model if self.ema is None else self.ema.model

    @property
    def attack(self) -> AttackConfig:
        """The settings of the training attack in this iteration."""
        attack = self.config.attack
        if attack.steps_ramp and self.done + attack.steps_ramp >= 1:  # 1 - steps_ramp would be rounded
            attack = attack.replace(num_steps=max(attack.num_steps, LATE_STEPS))
        if self.done < attack.epsilon_ramp:
            share = self.done / attack.epsilon_ramp
            size = None if attack.step_size is None or not share else share * attack.step_size
            attack = attack.replace(epsilon=share * attack.epsilon, step_size=size)
        return attack

    @property
    def tied(self) -> bool:
        """Whether the experts are tied in this iteration: their filters are kept equal."""
        return self.done < self.config.training.tied_share

    @property
    def awaits_groups(self) -> bool:
        """Whether the classes are not in groups yet, so that confusions are counted and routers have no target."""
        return self.config.training.router_target == "confusion" and self.groups is None

    @property
    def routers_rest(self) -> bool:
        """Whether no router learns now: the experts are tied, so their filters are equal, or routers that learn only from router
        terms wait for their target."""
        return self.tied or (self.awaits_groups and learn_from_terms_alone(self.config.training))

    def share(self, images: int) -> float:
        """`images` as a fraction of the batch of all ranks."""
        return 1.0 if self.draws.batch is None else images / self.draws.batch

    def fused_model(self) -> Classifier:
        """The model in its current state with folded norms, for attacks and router updates. Each call returns the same object."""
        refresh(self._fused_model, self.model)
        return self._fused_model

    @cached_property
    def passes(self) -> Passes:
        """The forward passes, compiled if the configuration says so."""
        return Passes(self.config)

    @cached_property
    def _fused_model(self) -> Classifier:
        return fused(self.model)


def single_level(state: TrainState, batches: Mapping[str, Batch]) -> Metrics:
    """Update one parameter set on one batch: standard training, AT (Dense), AT (S-Dense), AT (MoE), each phase of AT (Sparse)."""
    training = state.config.training
    if len(batches) != 1:
        raise UserError(f"the step single_level trains one level, not {' and '.join(batches)}")
    ((level, batch),) = batches.items()
    gate, attack_gate = make_gate(training.router_gate), make_gate(training.router_attack_gate)
    outcome = _update(state, level, batch, gate, attack_gate)
    state.watch.check()
    return _metrics(state, outcome, batch[1])


def two_level(state: TrainState, batches: Mapping[str, Batch]) -> Metrics:
    """AdvMoE: update the routers on one batch with fixed weights, then the weights on another batch with fixed routers.

    In the router update the backbone is in eval mode, so its running statistics do not change. The update is skipped in the
    iterations that `router_every` leaves out, while the experts are tied, because their filters are equal, and while routers that
    learn only from router terms wait for the target `confusion`.
    """
    if not {"routers", "weights"} <= batches.keys():
        raise UserError(f"the step two_level needs the levels routers and weights, not {' and '.join(batches)}")
    training = state.config.training
    metrics: Metrics = {}
    skip_routers = state.routers_rest or state.iteration % training.router_every != 0
    levels = [_weight_level] if skip_routers else [_router_level, _weight_level]
    for level in levels if training.level_order == "routers_first" else reversed(levels):
        metrics |= level(state, batches)
    state.watch.check()
    return metrics


def _router_level(state: TrainState, batches: Mapping[str, Batch]) -> Metrics:
    training = state.config.training
    for _ in range(training.router_steps):
        gate, attack_gate = make_gate(training.router_gate), make_gate(training.router_attack_gate)
        outcome = _update(state, "routers", batches["routers"], gate, attack_gate)
    images = len(batches["routers"][1])
    return {"router_loss": outcome.total.detach() * images, "router_images": outcome.total.new_full((), images)}


def _weight_level(state: TrainState, batches: Mapping[str, Batch]) -> Metrics:
    for _ in range(state.config.training.weight_steps):
        outcome = _update(state, "weights", batches["weights"], HARD, _weight_attack_gate(state))
    return _metrics(state, outcome, batches["weights"][1])


def _weight_attack_gate(state: TrainState) -> Gate:
    """The gate of the attack in the weight update. `alternate`: hard in even iterations, straight-through in the others."""
    name = state.config.training.weight_attack_gate
    return StraightThroughGate() if name == "straight_through" or (name == "alternate" and state.iteration % 2) else HARD


def _update(state: TrainState, level: str, batch: Batch, gate: Gate, attack_gate: Gate) -> Outcome:
    """Attack the current network on `batch`, then take one optimizer step of `level`. All other parameters are fixed."""
    x, y = batch
    state.passes.begin_update()
    optimizer, training = state.optimizers[level], state.config.training
    targets = _targets(state, x, y)
    x_adv, learner = x, state.model
    if state.loss.attack is not None or level == "routers":
        fused_model = state.fused_model()
        x_adv = _attacked(state, fused_model, (x, y if state.teacher is None else targets), attack_gate)
        learner = fused_model if level == "routers" else state.model  # the fused model shares the model's routers
    backward = partial(_backward, state, level, learner, gate, Example(x, x_adv, y, targets))
    with _learning(state.model, optimizer):
        # the level of the masks has no weights to perturb
        perturbs = level != "masks" and (level != "routers" or training.awp_routers)
        if training.awp and state.done >= training.awp_from and perturbs:
            with awp.perturbed(state.model, training.awp, backward, training.awp_routers):
                outcome = backward()
        else:
            outcome = backward()
        state.watch.gradients(state.model, level)
    _take_step(state, optimizer)
    return outcome


def _backward(state: TrainState, level: str, learner: Classifier, gate: Gate, example: Example) -> Outcome:
    """The loss, and its gradients to the parameters of `level`, summed over the ranks, and over the experts while they are tied.

    What the level trains is in train mode: its batch norms use the statistics of the batch. A network router has batch norms
    too: in eval mode nothing would bound its activations, and it would diverge within a few iterations.
    """
    optimizer = state.optimizers[level]
    state.model.tie_norms(state.tied and state.config.training.tied_statistics == "shared")
    learner.train(level != "routers")
    if learner.router is not None:
        learner.router.train(level in ROUTED_LEVELS)
    outcome = _loss(state, level, _forward(state, learner, gate), example)
    learner.eval()
    state.watch.outcome(outcome, level)
    if not outcome.total.requires_grad:
        raise UserError(f"the loss does not depend on the parameters of the level {level}: it is detached, or ignores the gate")
    optimizer.zero_grad(set_to_none=True)
    (outcome.total * state.share(len(example.y))).backward()
    distributed.sum_gradients(_parameters(optimizer))
    if state.tied:
        for layer in state.model.moe_layers():
            layer.tie_gradients()
    if state.routers_rest:
        for parameter in state.model.router_parameters():
            parameter.grad = None
    return outcome


def _loss(state: TrainState, level: str, forward: Forward, example: Example) -> Outcome:
    """The loss of the task, plus the router terms if routers learn. With router_loss `target` routers get only these terms."""
    training = state.config.training
    outcome = state.loss.value(forward, example.x, example.x_adv, example.targets, training.beta)
    check_outcome(outcome, training, (len(example.y), state.model.num_classes))
    if training.runner_up_consistency and level != "routers":
        term = training.runner_up_consistency * _runner_up_term(state, outcome, example.x_adv)
        outcome = outcome._replace(total=outcome.total + term)
    if not outcome.routings or level not in ROUTED_LEVELS:
        return outcome
    task = [] if level == "routers" and training.router_loss == "target" else [outcome.total]
    if state.awaits_groups:
        training = training.replace(router_target="none")
    terms = router_terms(training, outcome, example.y if state.groups is None else state.groups[example.y])
    return outcome._replace(total=sum(task + terms, outcome.total.new_zeros(())))


def _runner_up_term(state: TrainState, outcome: Outcome, x_adv: Tensor) -> Tensor:
    """KL(p(x') || p2(x')), mean over the images. It trains the experts to agree (after RT-ER).

    p are the network's probabilities. p2 are those along the same route except in one layer, where the expert with the
    second-largest routing logit runs. The layer is drawn again in each iteration. A network router has one choice for all layers,
    so all of them change. The pass moves no running statistics: experts would track images that they are not chosen for.
    """
    assert outcome.robust is not None
    routings = outcome.robust_routings
    layer = derive_seed(state.config.seed, state.iteration) % len(routings)
    route = torch.stack([routing.experts for routing in routings], dim=1)
    route[:, layer] = routings[layer].logits.topk(2, dim=1).indices[:, 1]
    with kept_statistics(state.model):
        other, _ = _forward(state, state.model, ForcedGate(route))(x_adv)
    return kl_divergence(other, full(outcome.robust).log_softmax(dim=1)).mean()


def _targets(state: TrainState, x: Tensor, y: Tensor) -> Tensor:
    """The targets of the loss: the labels [B], or probabilities [B, classes] if labels are smoothed or distilled.

    A teacher's probabilities replace the one-hot vectors of the labels.
    """
    training = state.config.training
    if training.soft_labels == "none" and not training.label_smoothing and state.teacher is None:
        return y
    if state.teacher is None:
        probabilities = F.one_hot(y, state.model.num_classes).float()
    else:
        probabilities = state.teacher.probabilities(x, state.rows.get(x))
    soft = labels.smoothed(probabilities, training.label_smoothing)
    if training.soft_labels == "adr":
        assert state.ema is not None
        with torch.no_grad():
            soft = labels.adr(soft, y, _forward(state, state.ema.model, HARD)(x)[0], state.done)
    return soft


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _attacked(state: TrainState, fused_model: Classifier, batch: Batch, gate: Gate) -> Tensor:
    """The adversarial images x', or x if the loss has no attack."""
    x, y = batch
    if state.loss.attack is None:
        return x
    with frozen(fused_model):
        x_adv = state.loss.attack(_forward(state, fused_model, gate), x, y, state.attack, state.draws)
    check_kind("the result of the loss's attack", x_adv, Tensor)
    if x_adv.shape != x.shape:
        raise UserError(f"the loss's attack must return images of the shape {list(x.shape)}, not {list(x_adv.shape)}")
    return x_adv


def _take_step(state: TrainState, optimizer: torch.optim.Optimizer) -> None:
    """Take one optimizer step if all checked tensors are finite. A fused optimizer tests this on the device."""
    if optimizer.defaults["fused"]:
        optimizer.found_inf = state.watch.failed()  # type: ignore[attr-defined]  # as torch.amp.GradScaler sets it
    else:
        state.watch.check()
    optimizer.step()


def _forward(state: TrainState, model: Classifier, gate: Gate) -> Forward:
    def forward(x: Tensor) -> tuple[Tensor, Routings]:
        with in_precision(x.device, state.autocast):
            return state.passes(model, x, gate)

    return forward


@contextmanager
def _learning(model: Classifier, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the block, only the parameters of the optimizer get gradients. A parameter that its backbone froze stays frozen."""
    learned = set(map(id, _parameters(optimizer)))
    fixed = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in learned]
    for parameter in fixed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in fixed:
            parameter.requires_grad_(True)


@torch.no_grad()
def _metrics(state: TrainState, outcome: Outcome, y: Tensor) -> Metrics:
    metrics = {"loss": outcome.total.detach() * len(y)}
    for name in ("clean", "robust"):
        logits: Tensor | None = getattr(outcome, name)
        if logits is not None:
            metrics[f"{name}_correct"] = (logits.argmax(dim=1) == y).sum()
    if outcome.routings:
        metrics["load"] = load(outcome.routings)
        metrics["router_entropy"] = entropy(outcome.routings)
    if state.awaits_groups and outcome.robust is not None:
        metrics[groups.MATRIX] = groups.confusion(outcome.robust, y)
    return metrics


def entropy(routings: Routings) -> Tensor:
    """Entropy of each layer's softmax over its logits, summed over the batch: [L], in nats."""
    p = torch.stack([routing.logits for routing in routings]).softmax(dim=2)
    sums: Tensor = torch.special.entr(p).sum(dim=(1, 2))
    return sums


def load(routings: Routings) -> Tensor:
    """The number of images that each expert of each layer got: [L, N] int64."""
    experts = torch.stack([routing.experts for routing in routings])
    numbers = torch.arange(routings[0].logits.shape[1], device=experts.device)
    return (experts[:, :, None] == numbers).sum(dim=1)

import copy
import math

import pytest
import torch
from image_specs import image_spec

from advmoe.attacks import BatchDraws
from advmoe.config import AttackConfig, RunConfig, TrainingConfig
from advmoe.models.resnet import ResNet
from advmoe.moe import DenseKind, ForcedGate, MoEKind, Routing
from advmoe.training.health import NonFinite
from advmoe.training.losses import LOSSES, Loss
from advmoe.training.methods import LEVELS
from advmoe.training.steps import TrainState, entropy, load, single_level, two_level

SIZE = 6


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(SIZE, 3, 12, 12, generator=generator), torch.randint(3, (SIZE,), generator=generator)


BATCHES = {"routers": batch(1), "weights": batch(2), "all": batch(3)}
ALL = {"all": BATCHES["all"]}


def make_state(levels=("routers", "weights"), *, kind=None, loss="trades", done=1.0, equal=False, blocks=(1, 1), **training):
    """A tiny network whose experts differ (unless `equal`), with calibrated statistics, and its optimizers."""
    torch.manual_seed(0)
    kind = kind or MoEKind(0.5, num_experts=2, bank="disjoint")
    model = ResNet(kind, image_spec(3), blocks=blocks, width=4, stem="cifar")
    with torch.no_grad():
        for layer in [] if equal else model.moe_layers():
            layer.filters.normal_(std=0.3)
        model.train()(BATCHES["all"][0])
    model.eval()
    settings = TrainingConfig(**{"lr": 0.05, "router_lr": 0.05, **training})
    config = RunConfig(attack=AttackConfig(epsilon=8 / 255, step_size=5 / 255, num_steps=2), training=settings)
    optimizers = {level: torch.optim.SGD(LEVELS[level](model), 0.05, 0.9, weight_decay=5e-4) for level in levels}
    draws = BatchDraws(torch.Generator().manual_seed(0))
    return TrainState(model, config, LOSSES[loss], optimizers, draws, None, done)


def copies(model):
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    return parameters, {name: value.clone() for name, value in model.named_buffers()}


def changed_names(before, named):
    return {name for name, value in named if not torch.equal(value, before[name])}


def names(model):
    routers = {name for name, _ in model.named_parameters() if ".router." in name}
    return routers, {name for name, _ in model.named_parameters()} - routers


class Spy:
    """A loss that records its calls in order."""

    def __init__(self, state, loss="trades"):
        self.state, self.original, self.events = state, LOSSES[loss], []
        self.loss = Loss(self.attack, self.value)

    def name(self, x):
        return next(level for level, (images, _) in BATCHES.items() if images is x)

    def note(self, what, x, **more):
        model = self.state.model
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.events.append(
            {"what": what, "batch": self.name(x), "training": model.training, "learning": learning,
             "parameters": copies(model)[0], **more}
        )  # fmt: skip

    def attack(self, forward, x, y, settings, draws):
        x_adv = self.original.attack(forward, x, y, settings, draws)
        _, routings = forward(x)
        self.note("attack", x, y=y, x_adv=x_adv, grad_path=forward(x)[0].requires_grad, routings=routings)
        return x_adv

    def value(self, forward, x, x_adv, y, beta):
        outcome = self.original.value(forward, x, x_adv, y, beta)
        self.note("value", x, y=y, x_adv=x_adv, beta=beta)
        return outcome

    def order(self):
        return [(event["what"], event["batch"]) for event in self.events]


def state_and_spy(**options):
    state = make_state(**options)
    spy = Spy(state)
    state.loss = spy.loss
    return state, spy


ROUTERS, WEIGHTS = [("attack", "routers"), ("value", "routers")], [("attack", "weights"), ("value", "weights")]


def test_the_router_step_changes_only_router_parameters():
    state, spy = state_and_spy(level_order="weights_first")
    two_level(state, BATCHES)
    # the router attack starts from the result of the weight step
    before, after = spy.events[2]["parameters"], copies(state.model)[0]
    routers, weights = names(state.model)
    assert changed_names(before, after.items()) == routers
    assert not changed_names({name: before[name] for name in weights}, [(name, after[name]) for name in weights])


def test_the_weight_step_changes_only_weights():
    state, spy = state_and_spy()
    before, _ = copies(state.model)
    two_level(state, BATCHES)
    routers, weights = names(state.model)
    assert changed_names(before, spy.events[2]["parameters"].items()) == routers
    assert changed_names(spy.events[2]["parameters"], state.model.named_parameters()) == weights


@pytest.mark.parametrize("gate", ["straight_through", "scaled", "soft"])
def test_the_router_step_changes_no_buffer(gate):
    state = make_state(router_gate=gate, router_attack_gate=gate)
    before = copies(state.model)[1]
    buffers = []
    loss = state.loss
    state.loss = Loss(lambda *args: (buffers.append(copies(state.model)[1]), loss.attack(*args))[1], loss.value)
    two_level(state, BATCHES)
    at_routers, at_weights = buffers
    assert not changed_names(before, at_routers.items())
    assert not changed_names(before, at_weights.items())


@pytest.mark.parametrize(("step", "levels"), [(two_level, ("routers", "weights")), (single_level, ("all",))])
def test_what_a_backbone_froze_stays_as_it_is(step, levels):
    state = make_state(levels)
    frozen = state.model.stem[0].weight.requires_grad_(False)
    before = frozen.clone()
    for _ in range(2):
        step(state, {level: BATCHES[level] for level in levels})
    assert not frozen.requires_grad
    assert torch.equal(frozen, before)


def test_the_weight_step_changes_running_statistics():
    state = make_state()
    before = copies(state.model)[1]
    two_level(state, BATCHES)
    updated = changed_names(before, state.model.named_buffers())
    assert {name for name in before if "running_" in name or "num_batches" in name} <= updated
    assert {name for name in before if ".router." in name} <= updated
    assert not {"normalize.mean", "normalize.std"} & updated


@pytest.mark.parametrize("tied", [False, True])
def test_the_norms_of_a_network_router_learn_in_the_router_step_only(tied):
    state = make_state(kind=MoEKind(0.5, num_experts=2, routers="per_network"), tied_share=1.0 if tied else 0.0, done=0.5)
    before, buffers, loss = copies(state.model)[1], [], state.loss
    state.loss = Loss(lambda *args: (buffers.append(copies(state.model)[1]), loss.attack(*args))[1], loss.value)
    two_level(state, BATCHES)
    of_router = {name for name in before if name.startswith("router.")}
    assert any("running_var" in name for name in of_router)
    at_weights = buffers[-1]  # when the weight update starts
    assert changed_names(before, at_weights.items()) == (set() if tied else of_router)
    updated = changed_names(at_weights, state.model.named_buffers())
    assert updated
    assert not updated & of_router
    assert not state.model.training
    assert not state.fused_model().router.training


def test_a_network_router_stays_finite_at_the_default_rate():
    """In eval mode nothing normalises its activations: after a few iterations the loss was above 1e15."""
    state = make_state(
        kind=MoEKind(0.5, num_experts=2, routers="per_network"), router_lr=0.1, router_loss="target",
        router_target="label_mod_n", router_target_weight=6.0, router_consistency=6.0,
    )  # fmt: skip
    state.optimizers["routers"].param_groups[0]["lr"] = 0.1
    losses = [two_level(state, BATCHES)["router_loss"].item() / SIZE for _ in range(12)]
    assert max(losses) < 1000
    assert losses[-1] < losses[0]


def test_each_level_uses_its_batch_and_routers_come_first():
    state, spy = state_and_spy()
    two_level(state, BATCHES)
    assert spy.order() == ROUTERS + WEIGHTS
    for event in spy.events:
        assert event["y"] is BATCHES[event["batch"]][1]


def test_level_order_weights_first():
    state, spy = state_and_spy(level_order="weights_first")
    two_level(state, BATCHES)
    assert spy.order() == WEIGHTS + ROUTERS


def test_every_step_of_a_level_has_a_new_attack():
    state, spy = state_and_spy(router_steps=2, weight_steps=3)
    two_level(state, BATCHES)
    assert spy.order() == 2 * ROUTERS + 3 * WEIGHTS
    attacked = [event["x_adv"] for event in spy.events if event["what"] == "attack"]
    assert not torch.equal(attacked[0], attacked[1])
    assert not torch.equal(attacked[2], attacked[3])


def test_the_second_level_attacks_the_network_after_the_first_levels_update():
    state, spy = state_and_spy()
    before, _ = copies(state.model)
    two_level(state, BATCHES)
    assert not changed_names(before, spy.events[0]["parameters"].items())
    assert changed_names(before, spy.events[2]["parameters"].items()) == names(state.model)[0]


def test_attacks_run_frozen_in_eval_mode_and_the_weights_update_in_train_mode():
    state, spy = state_and_spy()
    two_level(state, BATCHES)
    routers, weights = names(state.model)
    modes = [(event["what"], event["training"], event["learning"]) for event in spy.events]
    updates = [mode for mode in modes if mode[0] == "value"]
    assert updates == [("value", False, routers), ("value", True, weights)]
    assert not state.model.training
    assert all(parameter.requires_grad for parameter in state.model.parameters())
    assert not any(event["grad_path"] for event in spy.events if event["what"] == "attack")


def test_updates_get_the_attacks_images_and_beta():
    state, spy = state_and_spy(beta=4.5)
    two_level(state, BATCHES)
    for attack, value in (spy.events[:2], spy.events[2:]):
        assert value["x_adv"] is attack["x_adv"]
        assert value["beta"] == 4.5
        assert not torch.equal(attack["x_adv"], BATCHES[attack["batch"]][0])


def test_the_attack_does_not_change_gradients():
    state = make_state()
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    loss, unchanged = state.loss, []

    def attack(*args):
        before = {name: p.grad.clone() if p.grad is not None else None for name, p in state.model.named_parameters()}
        x_adv = loss.attack(*args)
        for name, parameter in state.model.named_parameters():
            equal = parameter.grad is None if before[name] is None else torch.equal(parameter.grad, before[name])
            unchanged.append((name, equal))
        return x_adv

    state.loss = Loss(attack, loss.value)
    two_level(state, BATCHES)
    assert len(unchanged) == 2 * len(list(state.model.parameters()))
    assert all(equal for _, equal in unchanged)


def test_old_gradients_do_not_change_an_update():
    fresh, stale = make_state(), make_state()
    for parameter in stale.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    for state in (fresh, stale):
        two_level(state, BATCHES)
    assert not changed_names(dict(fresh.model.named_parameters()), stale.model.named_parameters())


def test_weights_update_follows_sgd_by_hand():
    state = make_state(levels=("all",), kind=DenseKind(), loss="clean")
    state.optimizers["all"] = torch.optim.SGD(state.model.parameters(), 0.1)
    twin = copy.deepcopy(state.model).train()
    x, y = BATCHES["all"]
    torch.nn.functional.cross_entropy(twin(x), y).backward()
    single_level(state, ALL)
    for (name, learned), parameter in zip(state.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(learned, parameter - 0.1 * parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("loss", ["trades", "pgd_at"])
def test_at_moe_updates_everything_on_one_batch(loss):
    state = make_state(levels=("all",), loss=loss)
    spy = Spy(state, loss)
    state.loss = spy.loss
    before = copies(state.model)[0]
    single_level(state, ALL)
    assert changed_names(before, state.model.named_parameters()) == set(before)
    assert spy.order() == [("attack", "all"), ("value", "all")]
    assert spy.events[1]["training"]
    assert spy.events[1]["learning"] == set(before)


def test_dense_networks_train_with_single_level():
    state = make_state(levels=("all",), kind=DenseKind())
    before = copies(state.model)[0]
    metrics = single_level(state, ALL)
    assert changed_names(before, state.model.named_parameters()) == set(before)
    assert set(metrics) == {"loss", "clean_correct", "robust_correct"}


def experts_are_equal(layer):
    first = layer.filters[: layer.width]
    return torch.equal(layer.filters, first[torch.arange(len(layer.filters)) % layer.width])


@pytest.mark.parametrize("bank", ["disjoint", "backbone"])
@pytest.mark.parametrize("num_experts", [2, 4])
def test_the_filters_of_tied_experts_stay_equal_and_routers_do_not_change(num_experts, bank):
    kind = MoEKind(0.75, num_experts=num_experts, bank=bank, norms="shared")
    state, spy = state_and_spy(kind=kind, equal=True, done=0.49, tied_share=0.5)
    before = copies(state.model)[0]
    for _ in range(3):
        two_level(state, BATCHES)
    routers, weights = names(state.model)
    assert all(experts_are_equal(layer) for layer in state.model.moe_layers())
    assert changed_names(before, state.model.named_parameters()) == weights
    assert spy.order() == 3 * WEIGHTS
    state.done = 0.5
    two_level(state, BATCHES)
    assert not any(experts_are_equal(layer) for layer in state.model.moe_layers())
    assert routers & changed_names(before, state.model.named_parameters())
    assert spy.order() == 3 * WEIGHTS + ROUTERS + WEIGHTS


def test_the_filters_of_tied_experts_stay_equal_under_at_moe():
    state = make_state(levels=("all",), equal=True, done=0.0, tied_share=0.5)
    for _ in range(2):
        single_level(state, ALL)
    assert all(experts_are_equal(layer) for layer in state.model.moe_layers())


@pytest.mark.parametrize("statistics", ["own", "shared"])
@pytest.mark.parametrize(("step", "batches"), [(two_level, BATCHES), (single_level, ALL)])
def test_tied_experts_with_shared_statistics_give_the_same_logits_on_every_route(step, batches, statistics):
    state = make_state(levels=tuple(batches), equal=True, done=0.0, tied_share=0.5, tied_statistics=statistics)
    for _ in range(2):
        step(state, batches)
    x, layers = torch.rand(4, *BATCHES["weights"][0].shape[1:]), len(state.model.moe_layers())
    logits = [state.model.forward_routed(x, ForcedGate(torch.full((4, layers), expert)))[0] for expert in (0, 1)]
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-5) == (statistics == "shared")
    state.done = 0.5
    step(state, batches)
    assert not any(layer.norm.tied for layer in state.model.moe_layers())


def test_experts_are_tied_in_the_first_tied_share_of_the_training():
    assert not make_state(done=0.0, tied_share=0.0).tied
    assert make_state(done=0.999, tied_share=1.0).tied


def test_metrics_are_sums_over_the_batch():
    state = make_state()
    outcomes, loss = [], state.loss
    state.loss = Loss(loss.attack, lambda *args: outcomes.append(loss.value(*args)) or outcomes[-1])
    metrics = two_level(state, BATCHES)
    router, weight = outcomes
    y = BATCHES["weights"][1]
    assert set(metrics) == {
        "router_loss", "router_images", "loss", "clean_correct", "robust_correct", "load", "router_entropy"
    }  # fmt: skip
    assert metrics["router_images"].item() == SIZE
    assert metrics["router_loss"].item() == pytest.approx(SIZE * router.total.item())
    assert metrics["loss"].item() == pytest.approx(SIZE * weight.total.item())
    assert metrics["clean_correct"].item() == sum(p == t for p, t in zip(weight.clean.argmax(1).tolist(), y.tolist(), strict=True))
    assert metrics["robust_correct"].item() == (weight.robust.argmax(1) == y).sum().item()
    assert metrics["load"].shape == (4, 2)
    assert metrics["load"].sum(dim=1).tolist() == [SIZE] * 4
    assert metrics["router_entropy"].shape == (4,)
    assert not any(value.requires_grad for value in metrics.values())


def test_entropy_by_hand():
    one_sided, even = torch.tensor([[0.0, 1000.0], [0.0, 0.0]]), torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    result = entropy((Routing(one_sided, torch.tensor([1, 0])), Routing(even, torch.tensor([1, 0]))))
    three_to_one = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert result.tolist() == pytest.approx([math.log(2), three_to_one + math.log(2)])


def test_load_by_hand():
    first = Routing(torch.zeros(4, 3), torch.tensor([0, 2, 2, 2]))
    second = Routing(torch.zeros(4, 3), torch.tensor([1, 1, 0, 1]))
    assert load((first, second)).tolist() == [[1, 0, 3], [1, 3, 0]]


def test_a_nan_stops_the_step_before_it_changes_parameters():
    state = make_state()
    with torch.no_grad():
        state.model.moe_layers()[2].router.linear.bias[0] = float("nan")
    before = copies(state.model)[0]
    with pytest.raises(NonFinite, match="logits of router 2"):
        two_level(state, BATCHES)
    after = copies(state.model)[0]
    assert all(torch.equal(after[name].nan_to_num(9), before[name].nan_to_num(9)) for name in before)
    assert all(parameter.requires_grad for parameter in state.model.parameters())


def test_steps_are_deterministic():
    first, second = make_state(), make_state()
    for state in (first, second):
        two_level(state, BATCHES)
    assert not changed_names(dict(first.model.named_parameters()), second.model.named_parameters())

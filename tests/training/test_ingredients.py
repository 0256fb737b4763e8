"""Options beyond the paper: values computed by hand, resuming bit by bit, errors."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from recorder import Recorder
from test_steps import ALL, BATCHES, ROUTERS, WEIGHTS, Spy, changed_names, experts_are_equal, make_state, names, state_and_spy
from torch.nn import functional as F

from advmoe.config import AttackConfig, RunConfig, TrainingConfig
from advmoe.config.schema import OF_LEVELS
from advmoe.data.stream import Entry, stream
from advmoe.errors import UserError
from advmoe.moe import DenseKind, ForcedGate, HardGate, MoEKind, Routing, StraightThroughGate
from advmoe.reports.cell import OF_ROUTERS
from advmoe.training import awp, labels, steps, terms
from advmoe.training.accuracy import correct_flags
from advmoe.training.batches import _augmentation, batches
from advmoe.training.checkpoint import RunFolder
from advmoe.training.checks import check
from advmoe.training.ema import Ema
from advmoe.training.loop import train
from advmoe.training.losses import Outcome
from advmoe.training.methods import METHODS, Phase, traits
from advmoe.training.start import best_network
from advmoe.training.steps import single_level, two_level

LOG3 = math.log(3)
SECONDS = {"train_seconds", "validate_seconds"}
ALL_OPTIONS = {
    "ema": 0.9, "label_smoothing": 0.1, "soft_labels": "adr", "awp": 0.01, "awp_from": 0.5, "awp_routers": True,
    "epsilon_ramp": 0.5, "steps_ramp": 0.4, "weight_attack_gate": "alternate", "router_every": 2, "router_target": "confusion",
    "router_target_weight": 2.0, "router_consistency": 3.0, "router_margin": 0.5, "runner_up_consistency": 0.5,
    "router_loss": "target", "level_batches": "same", "tied_share": 0.0, "activation": "silu", "augment": "idbh_weak",
    "augment_from": 0.5, "router_statistics": "plain",
}  # fmt: skip


# The moving average


def test_average_over_three_updates_by_hand():
    model = make_state().model
    parameter = model.classifier.bias
    with torch.no_grad():
        parameter.copy_(torch.tensor([1.0, 0.0, 0.0]))
    ema = Ema(model, 0.2)
    for value in (2.0, 3.0, 4.0):  # decays 1 / 10, 2 / 11, and then 0.2, which is less than 3 / 12
        with torch.no_grad():
            parameter[0] = value
        ema.update(model)
    first = 0.1 * 1 + 0.9 * 2
    second = 2 / 11 * first + 9 / 11 * 3
    assert ema.model.classifier.bias[0].item() == pytest.approx(0.2 * second + 0.8 * 4)
    assert ema.updates == 3
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_average_follows_routers_and_statistics():
    state = make_state()
    ema = Ema(state.model, 0.9)
    before = {name: value.clone() for name, value in ema.model.state_dict().items()}
    two_level(state, BATCHES)
    ema.update(state.model)
    for name, value in state.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(ema.model.state_dict()[name], 0.1 * before[name] + 0.9 * value, msg=name)
        else:
            assert torch.equal(ema.model.state_dict()[name], value), name


def test_the_average_is_validated_saved_and_loaded(tiny, splits, tmp_path, monkeypatch):
    validated = []

    def flags(model, images):
        validated.append(model.classifier.weight.clone())
        return correct_flags(model, images)

    monkeypatch.setattr("advmoe.training.validation.correct_flags", flags)
    config = tiny("at_dense", ema=0.5, epochs=2)
    history = train(config, splits, tmp_path / "run", Recorder())
    model, epoch = best_network(RunFolder(tmp_path / "run").best(), config, splits), RunFolder(tmp_path / "run").best().epoch
    assert 100 * correct_flags(model, splits.val).float().mean().item() == pytest.approx(history[epoch - 1]["val_sa"], abs=1e-4)
    latest = RunFolder(tmp_path / "run").latest()
    trained = latest.optimizer_states()["trained"]
    assert trained["updates"] == 6
    assert torch.equal(validated[-1], latest.model_state()["classifier.weight"])
    assert not torch.equal(validated[-1], trained["weights"]["classifier.weight"])


# Labels


def test_smoothed_labels_by_hand():
    assert labels.smoothed(F.one_hot(torch.tensor([2]), 4), 0.2)[0].tolist() == pytest.approx([0.05, 0.05, 0.85, 0.05])


@pytest.mark.parametrize(("done", "temperature", "weight"), [(0.0, 2.5, 0.7), (0.5, 2.25, 0.825), (1.0, 2.0, 0.95)])
def test_adr_labels_by_hand(done, temperature, weight):
    sure = [0.98, 0.01, 0.01]
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], sure]).log() * temperature
    y = torch.tensor([0, 1, 1])
    correct, wrong, surely_wrong = labels.adr(F.one_hot(y, 3), y, logits, done).tolist()
    assert correct == pytest.approx([weight * 0.6 + 1 - weight, weight * 0.3, weight * 0.1])
    weight_wrong = weight - (0.6 - 0.3)
    assert wrong == pytest.approx([weight_wrong * 0.6, weight_wrong * 0.3 + 1 - weight_wrong, weight_wrong * 0.1])
    assert surely_wrong == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)  # the weight would be below 0


def test_the_labels_of_adr_are_those_of_the_average_on_its_routes():
    state = make_state(levels=("all",), done=0.5, ema=0.9, soft_labels="adr", label_smoothing=0.2)
    state.ema = Ema(state.model, 0.9)
    with torch.no_grad():
        state.ema.model.classifier.weight.mul_(3)
        for layer in state.ema.model.moe_layers():
            layer.router.linear.weight.neg_()
    x, y = ALL["all"]
    seen, loss = [], state.loss
    state.loss = replace(loss, value=lambda *args: seen.append(args[3]) or loss.value(*args))
    single_level(state, ALL)
    one_hot = labels.smoothed(F.one_hot(y, 3), 0.2)
    torch.testing.assert_close(seen[0], labels.adr(one_hot, y, state.ema.model(x), 0.5))


def test_adr_schedules_by_hand():
    assert [labels.annealed(done, labels.ADR_TEMPERATURE) for done in (0, 0.5, 1)] == pytest.approx([2.5, 2.25, 2.0])
    assert [labels.annealed(done, labels.ADR_LAMBDA) for done in (0, 0.5, 1)] == pytest.approx([0.7, 0.825, 0.95])


def test_label_smoothing_equals_torchs():
    losses = []
    for smoothing in (0.0, 0.3):
        state = make_state(levels=("all",), kind=DenseKind(), loss="clean", label_smoothing=smoothing)
        twin = make_state(levels=("all",), kind=DenseKind()).model.train()
        x, y = ALL["all"]
        expected = torch.nn.functional.cross_entropy(twin(x), y, label_smoothing=smoothing).item()
        losses.append(single_level(state, ALL)["loss"].item() / len(y))
        assert losses[-1] == pytest.approx(expected, rel=1e-5)
    assert losses[0] != losses[1]


# Adversarial weight perturbation


def test_perturbation_step_by_hand():
    w, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    assert awp.step(w, g, 0.1).tolist() == [[0.0, pytest.approx(0.5)]]
    assert awp.step(w, torch.zeros_like(w), 0.1).tolist() == [[0.0, 0.0]]


def test_perturbed_takes_one_ascent_step_and_undoes_it():
    model, (x, y) = make_state().model.train(), BATCHES["all"]

    def backward():
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with awp.perturbed(model, 0.5, backward):
        w, gradient = before["classifier.weight"], model.classifier.weight.grad
        torch.testing.assert_close(model.classifier.weight.detach(), w + 0.5 * w.norm() * gradient / gradient.norm())
        assert torch.equal(model.classifier.bias, before["classifier.bias"])
        assert not changed_names(before, model.named_buffers())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_perturbation_changes_weights_but_no_router_and_starts_at_awp_from():
    counts = []
    for done in (0.4, 0.6):
        state = make_state(done=done, awp=0.1, awp_from=0.5)
        spy = Spy(state)
        state.loss = spy.loss
        two_level(state, BATCHES)
        values = [event for event in spy.events if event["what"] == "value" and event["batch"] == "weights"]
        counts.append(len(values))
        if len(values) == 2:
            moved = changed_names(values[0]["parameters"], values[1]["parameters"].items())
            assert moved == {name for name in names(state.model)[1] if "norm" not in name and not name.endswith("bias")}
    assert counts == [1, 2]


def test_the_biases_of_experts_are_not_perturbed():
    """Layers that `convert` makes of a convolution with a bias and without a batch norm have them: [N, K]."""
    layer = (model := make_state().model).moe_layers()[0]
    layer.bias = torch.nn.Parameter(torch.ones(layer.num_experts, layer.filters.shape[0] // layer.num_experts))

    def backward():
        sum(parameter.square().sum() for parameter in model.parameters()).backward()

    filters = layer.filters.detach().clone()
    with awp.perturbed(model, 0.5, backward):
        assert torch.equal(layer.bias, torch.ones_like(layer.bias))
        assert not torch.equal(layer.filters, filters)


@pytest.mark.parametrize(("step", "levels"), [(two_level, ("routers", "weights")), (single_level, ("all",))])
def test_tied_experts_are_perturbed_alike(step, levels):
    state = make_state(levels=levels, equal=True, done=0.0, tied_share=1.0, awp=0.1)
    trades, equal = state.loss, []

    def value(*inputs):
        equal.append(all(experts_are_equal(layer) for layer in state.model.moe_layers()))
        return trades.value(*inputs)

    state.loss = replace(trades, value=value)
    step(state, {level: BATCHES[level] for level in levels})
    assert equal == [True, True]  # at the weights, and where they are perturbed


@pytest.mark.parametrize(("routers", "levels"), [(False, {"weights"}), (True, {"weights", "routers"})])
def test_awp_routers_perturbs_routers_in_the_routers_update(routers, levels):
    state = make_state(awp=0.1, awp_routers=routers)
    spy = Spy(state)
    state.loss = spy.loss
    two_level(state, BATCHES)
    for level, parameters in zip(("routers", "weights"), names(state.model), strict=True):
        values = [event["parameters"] for event in spy.events if event["what"] == "value" and event["batch"] == level]
        assert len(values) == 1 + (level in levels)
        moved = changed_names(values[0], values[-1].items())
        assert moved == (
            {name for name in parameters if "norm" not in name and values[0][name].ndim > 1} if level in levels else set()
        )


# Routers


A = Routing(torch.tensor([[0.0, 0.0], [LOG3, 0.0]]), torch.tensor([0, 0]))  # p = 1/2, 1/2 and 3/4, 1/4
B = Routing(torch.tensor([[LOG3, 0.0], [LOG3, 0.0]]), torch.tensor([0, 0]))  # p = 3/4, 1/4 twice


def test_router_terms_by_hand():
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert terms.consistency((A, B), (B, B)).item() == pytest.approx(first / 2)
    other = Routing(torch.tensor([[0.0, 0.4, 0.1], [5.0, 1.0, 1.0]]), torch.tensor([1, 0]))
    assert terms.margin((A, other)).item() == pytest.approx(((1 - 0) + 0) / 2 + ((1 - 0.3) + 0) / 2, abs=1e-6)
    assert terms.margin((Routing(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)),)).item() == 0
    y = torch.tensor([4, 3])  # modulo 2: 0 and 1
    layers = [(math.log(2) + math.log(4)) / 2, (math.log(4 / 3) + math.log(4)) / 2]
    assert terms.target((A, B), y).item() == pytest.approx(sum(layers) / 2)


def test_router_loss_target_is_only_the_router_terms_and_the_weights_loss_has_none():
    options = {"router_target": "label_mod_n", "router_target_weight": 2.0, "router_consistency": 3.0, "router_loss": "target"}
    state, plain = make_state(level_order="weights_first", **options), make_state(level_order="weights_first")
    outcomes, value = [], state.loss.value
    state.loss = type(state.loss)(state.loss.attack, lambda *args: outcomes.append(value(*args)) or outcomes[-1])
    metrics, y = two_level(state, BATCHES), BATCHES["routers"][1]
    clean, robust = outcomes[1].routings, outcomes[1].robust_routings
    expected = 2 * (terms.target(clean, y) + terms.target(robust, y)) / 2 + 3 * terms.consistency(clean, robust)
    assert metrics["router_loss"].item() == pytest.approx(len(y) * expected.item(), rel=1e-5)
    assert metrics["loss"].item() == two_level(plain, BATCHES)["loss"].item()


def test_the_pass_through_the_runner_up_moves_no_statistics():
    plain, runner_up = make_state(), make_state(runner_up_consistency=1.0)
    for state in (plain, runner_up):
        two_level(state, BATCHES)
    buffers = dict(plain.model.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in runner_up.model.named_buffers())
    parameters = dict(plain.model.named_parameters())
    assert any(not torch.equal(value, parameters[name]) for name, value in runner_up.model.named_parameters())


def test_runner_up_term_is_kl_through_the_second_expert_of_one_layer():
    state, x = make_state(kind=MoEKind(0.5, num_experts=3, bank="disjoint")), BATCHES["weights"][0]
    with torch.no_grad():
        logits, routings = state.model.forward_routed(x)
        outcome = Outcome(logits.sum(), logits, logits, routings, routings)
        route = torch.stack([routing.experts for routing in routings], dim=1)
        layers = set()
        for state.iteration in range(20):
            term = steps._runner_up_term(state, outcome, x)
            expected = []
            for layer in range(len(routings)):
                other = route.clone()
                other[:, layer] = routings[layer].logits.argsort(dim=1)[:, 1]  # of three
                q = state.model.forward_routed(x, ForcedGate(other))[0].log_softmax(dim=1)
                p = logits.log_softmax(dim=1)
                expected.append((p.exp() * (p - q)).sum(dim=1).mean().item())
            distances = [abs(value - term.item()) for value in expected]
            assert min(distances) < 1e-6
            layers.add(distances.index(min(distances)))
    assert layers == set(range(len(routings)))


def test_the_runner_up_term_is_added_to_the_loss_of_the_weights_with_its_weight(monkeypatch):
    monkeypatch.setattr(steps, "_runner_up_term", lambda *_: torch.tensor(0.25))
    plain, runner_up = (two_level(make_state(runner_up_consistency=weight), BATCHES) for weight in (0.0, 2.0))
    assert (runner_up["loss"] - plain["loss"]).item() == pytest.approx(2 * 0.25 * len(BATCHES["weights"][1]), rel=1e-4)
    assert torch.equal(runner_up["router_loss"], plain["router_loss"])


@pytest.mark.parametrize(("gate", "kinds"), [("hard", "hh"), ("straight_through", "ss"), ("alternate", "hs")])
def test_gate_of_the_weights_attack(gate, kinds, monkeypatch):
    state, gates, original = make_state(weight_attack_gate=gate), [], steps._attacked

    def attacked(state, twin, batch, gate):
        gates.append(gate)
        return original(state, twin, batch, gate)

    monkeypatch.setattr(steps, "_attacked", attacked)
    for state.iteration in (0, 1):
        two_level(state, BATCHES)
    assert [type(gate) for gate in gates[1::2]] == [{"h": HardGate, "s": StraightThroughGate}[kind] for kind in kinds]
    assert all(isinstance(gate, StraightThroughGate) for gate in gates[::2])


def test_routers_are_updated_in_every_kth_iteration():
    state, spy = state_and_spy(router_every=3)
    for state.iteration in range(4):
        two_level(state, BATCHES)
    assert spy.order() == ROUTERS + WEIGHTS + WEIGHTS + WEIGHTS + ROUTERS + WEIGHTS


def test_router_loss_with_router_every_is_a_mean_over_the_images_of_router_updates(tiny, splits, tmp_path, recorder):
    train(tiny(router_every=2, tied_share=0.0, epochs=1), splits, tmp_path / "run", recorder)
    train(tiny(tied_share=0.0, epochs=1), splits, tmp_path / "every", recorder)
    every_second, every = recorder.rows
    assert every_second["router_loss"] == pytest.approx(every["router_loss"], rel=0.3)


def test_both_levels_get_the_same_batch(tiny, splits):
    config = tiny(level_batches="same", batch_size=40)  # more than half of the images
    for routers, weights in batches(config, splits.train, 0, 2):
        assert routers is weights


# Augmentation


def test_another_augmentation_starts_after_a_fraction_of_each_phase(tiny, splits):
    config = tiny("at_sparse", epochs=4, augment="crop_shift", augment_from=0.5)
    names = [_augmentation(config, epoch).augment for epoch in range(8)]
    assert names == ["crop_flip", "crop_flip", "crop_shift", "crop_shift"] * 2
    plain = tiny("at_sparse", epochs=4)
    for epoch, same in ((1, True), (2, False)):
        (first,), (other,) = (next(batches(each, splits.train, epoch, 1)) for each in (config, plain))
        assert torch.equal(first.raw, other.raw) is same


def test_another_augmentation_starts_at_its_share_whatever_the_rounding(tiny):
    for epochs in (1, 7, 10, 100):
        for start in range(epochs):
            config = tiny(epochs=epochs, augment="crop_shift", augment_from=start / epochs)
            assert next(epoch for epoch in range(epochs) if _augmentation(config, epoch).augment == "crop_shift") == start


def test_streamed_images_keep_their_crops(tiny, splits, tmp_path):
    streamed = replace(splits, train=stream("", [Entry(str(row), 0, 0, row % 10, 0) for row in range(60)]))
    with pytest.raises(UserError, match=r"^augment crop_shift is for images in memory, not for fashion-mnist$"):
        train(tiny(augment="crop_shift"), streamed, tmp_path / "run", Recorder())


# Ramps


def test_ramps_of_the_attack_by_hand():
    state = make_state()
    state.config = RunConfig(attack=AttackConfig(epsilon=0.2, num_steps=2, epsilon_ramp=0.5, steps_ramp=0.25))
    settings = []
    for state.done in (0.0, 0.25, 0.5, 0.74, 0.75):
        settings.append((state.attack.epsilon, state.attack.num_steps, state.attack.step))
    expected = [(0, 2, 0), (0.1, 2, 0.0625), (0.2, 2, 0.125), (0.2, 2, 0.125), (0.2, 5, 0.05)]
    assert [value for row in settings for value in row] == pytest.approx([value for row in expected for value in row])
    state.config = RunConfig(attack=AttackConfig(epsilon=0.2, step_size=0.1, epsilon_ramp=0.5))
    state.done = 0.25
    assert state.attack.step == pytest.approx(0.05)


def test_more_steps_begin_in_the_first_iteration_of_their_share():
    """1 - 0.7 is rounded to more than 0.3."""
    state = make_state()
    state.config, state.done = RunConfig(attack=AttackConfig(num_steps=2, steps_ramp=0.7)), 0.3
    assert state.attack.num_steps == 5


# All of them together


@pytest.mark.parametrize("end", [(1, 2), (2, 1)])
def test_a_run_records_its_generated_images_and_refuses_others(end, tiny, splits, tmp_path):
    path, other = tmp_path / "generated.npz", tmp_path / "other.npz"
    for file, value in ((path, 99), (other, 98)):
        np.savez(file, image=np.full((50, 28, 28, 1), value, np.uint8), label=np.arange(50) % 10)
    config = tiny("at_small_dense", generated=str(path), epochs=2, save_minutes=0.0)
    with pytest.raises(KeyboardInterrupt):
        train(config, splits, tmp_path / "run", Recorder(lambda epoch, done: (epoch, done) == end))
    path.rename(tmp_path / "first.npz")
    other.rename(path)
    with pytest.raises(UserError, match=r"^generated .*generated\.npz: its images have changed since the run began$"):
        train(config, splits, tmp_path / "run", Recorder(), resume=True)
    (tmp_path / "first.npz").rename(path)
    history = train(config, splits, tmp_path / "run", Recorder(), resume=True)
    assert len({row["generated"] for row in history}) == 1
    path.unlink()
    assert train(config, splits, tmp_path / "run", Recorder()) == history  # a finished run does not need the file
    best_network(RunFolder(tmp_path / "run").best(), config, splits)  # and neither does an evaluation


OF_ATTACKS = ("epsilon_ramp", "steps_ramp", "teacher")


@pytest.mark.parametrize(
    ("method", "left_out"),
    [
        ("advmoe", ()),
        ("at_moe", OF_LEVELS),
        ("at_sparse", (*OF_LEVELS, "router", "runner_up", "awp_routers")),
        ("standard", (*OF_LEVELS, "router", "runner_up", "awp_routers", *OF_ATTACKS)),
    ],
)
def test_a_run_with_all_options_resumes_bit_by_bit(method, left_out, tiny, splits, tmp_path):
    np.savez(tmp_path / "generated.npz", image=np.full((50, 28, 28, 1), 99, np.uint8), label=np.arange(50) % 10)
    train(tiny("at_dense", epochs=1), splits, tmp_path / "teacher", Recorder())
    files = {"teacher": str(tmp_path / "teacher"), "generated": str(tmp_path / "generated.npz"), "generated_share": 0.4}
    options = {name: value for name, value in (ALL_OPTIONS | files).items() if not name.startswith(left_out)}
    config = tiny(method, epochs=2, save_minutes=0.0, **options)
    uninterrupted = train(config, splits, tmp_path / "uninterrupted", Recorder())
    with pytest.raises(KeyboardInterrupt):
        train(config, splits, tmp_path / "resumed", Recorder(lambda epoch, done: (epoch, done) == (2, 2)))
    resumed = train(config, splits, tmp_path / "resumed", Recorder(), resume=True)
    assert [{k: v for k, v in row.items() if k not in SECONDS} for row in resumed] == [
        {k: v for k, v in row.items() if k not in SECONDS} for row in uninterrupted
    ]
    expected, resumed_checkpoint = (RunFolder(tmp_path / name).latest() for name in ("uninterrupted", "resumed"))
    assert all(torch.equal(value, resumed_checkpoint.model_state()[name]) for name, value in expected.model_state().items())
    trained = [each.optimizer_states()["trained"] for each in (expected, resumed_checkpoint)]
    assert trained[0]["updates"] == trained[1]["updates"]
    assert all(torch.equal(value, trained[1]["weights"][name]) for name, value in trained[0]["weights"].items())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("at_dense", {"router_consistency": 1.0}, "router_consistency is for methods with routers, not at_dense"),
        ("at_small_dense", {"router_target": "label_mod_n"}, "router_target is for methods with routers, not at_small_dense"),
        ("standard", {"loss": "pgd_at"}, "loss is fixed by the method standard, and cannot be pgd_at"),
        ("at_dense", {"router_gate": "soft"}, "router_gate is for methods with routers, not at_dense"),
        ("standard", {"epsilon_ramp": 0.5}, "epsilon_ramp needs a loss with an attack, not clean"),
        ("at_dense", {"steps_ramp": 0.5, "num_steps": 10}, "steps_ramp raises num_steps to 5, and it is 10 already"),
        ("at_dense", {"image_size": 32}, "image_size 32 is for a folder of images, and fashion-mnist has images of 28"),
        ("advmoe", {"tied_statistics": "shared", "tied_share": 0.0}, "tied_statistics needs tied_share"),
        ("advmoe", {"tied_statistics": "shared", "norms": "shared"}, "tied_statistics shared needs norms per_expert, not shared"),
        ("advmoe", {"router_loss": "target"}, "router_loss target leaves the routers no loss: all router terms have the weight 0"),
        ("advmoe", {"router_consistency": 1.0, "loss": "pgd_at"}, "router_consistency needs a loss with clean images, not pgd_at"),
        (
            "advmoe",
            {"router_loss": "target", "router_target": "label_mod_n", "router_target_weight": 0.0},
            "router_loss target leaves the routers no loss: all router terms have the weight 0",
        ),
        (
            "advmoe",
            {"router_gate": "hard"},
            "router_gate hard passes the routers no gradient, and there is no router term that they learn from",
        ),
        (
            "advmoe",
            {"router_schedule": "untied", "tied_share": 0.0},
            "router_schedule untied needs tied_share, or router_loss target with router_target confusion alone",
        ),
        ("advmoe", {"beta": 3.0, "loss": "pgd_at"}, "beta is for the loss trades, not pgd_at"),
        ("standard", {"beta": 3.0}, "beta is for the loss trades, not clean"),
        ("at_dense", {"soft_labels": "adr"}, "soft_labels adr needs ema"),
        ("at_dense", {"awp": 0.01, "awp_routers": True}, "awp_routers is for methods with routers, not at_dense"),
        ("at_dense", {"balance": "switch"}, "balance is for methods with routers, not at_dense"),
        ("advmoe", {"awp_routers": True}, "awp_routers needs awp"),
        ("at_dense", {"augment_from": 0.5}, "augment_from needs augment"),
        ("at_dense", {"crop_padding": 28}, "crop_padding must be less than 28, the side of the images, not 28"),
        ("advmoe", {"router_margin": 1.0, "num_experts": 1}, "router_margin needs at least 2 experts"),
        ("at_moe", {"balance": "switch", "num_experts": 1}, "balance needs at least 2 experts"),
        (
            "advmoe",
            {"router_target": "confusion", "epochs": 1},
            "router_target confusion needs at least 2 epochs: in the first, it is counted which classes are confused",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(method, options, message, tiny, splits, tmp_path):
    with pytest.raises(UserError) as caught:
        train(tiny(method, **options), splits, tmp_path / "run", Recorder())
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


OTHER_VALUES = {
    "level_order": "weights_first", "level_batches": "same", "weight_attack_gate": "alternate", "router_steps": 2,
    "weight_steps": 2, "router_every": 2, "router_loss": "target",
}  # fmt: skip


@pytest.mark.parametrize("name", OF_LEVELS)
def test_settings_of_two_levels_are_refused_for_other_methods_and_known_to_reports(name, tiny, splits):
    with pytest.raises(UserError, match=f"^{name} is for advmoe, not at_moe$"):
        check(tiny("at_moe", **{name: OTHER_VALUES[name]}), splits)
    assert f"training.{name}" in OF_ROUTERS


def test_settings_of_two_levels_are_for_methods_with_such_a_phase(tiny, splits, monkeypatch):
    phases = (Phase(single_level, ("weights",)), *METHODS["advmoe"].phases)
    monkeypatch.setitem(METHODS, "later", replace(METHODS["advmoe"], phases=phases))
    check(tiny("later", router_every=2), splits)
    assert traits(METHODS["later"]).two_levels


@pytest.mark.parametrize(
    "options", [{"balance": "switch"}, {"router_target": "label_mod_n"}, {"router_consistency": 1.0}, {"router_margin": 1.0}]
)
def test_routers_behind_a_hard_gate_may_learn_from_their_terms(options, tiny, splits):
    check(tiny(router_gate="hard", **options), splits)
    check(tiny("at_moe", router_gate="hard"), splits)  # the routers stay as drawn


def test_the_message_names_the_loss_that_a_method_fixes(tiny, splits, monkeypatch):
    monkeypatch.setitem(METHODS, "fixed", replace(METHODS["advmoe"], loss="pgd_at"))
    with pytest.raises(UserError, match="needs a loss with clean images, not pgd_at"):
        check(tiny("fixed", router_consistency=1.0), splits)


@pytest.mark.parametrize(("name", "value"), [("ema", 1.0), ("label_smoothing", -0.1), ("awp_from", 1.0), ("router_every", 0)])
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        TrainingConfig(**{name: value})

"""The work of one iteration of each method: images through convolutions, batch norm statistics, reads from the device."""

from collections import Counter

import pytest
import torch
from recorder import Recorder
from small_backbone import SMALL_RESNET
from torch.utils._python_dispatch import TorchDispatchMode

from advmoe.attacks import BatchDraws
from advmoe.config import AttackConfig, ModelConfig, RunConfig
from advmoe.data import ImageSpec
from advmoe.models import build_model, fused
from advmoe.moe import ExpertNorm
from advmoe.training import steps
from advmoe.training.distill import Teacher
from advmoe.training.ema import Ema
from advmoe.training.health import NonFinite
from advmoe.training.loop import train
from advmoe.training.losses import LOSSES, RSLAD, Loss
from advmoe.training.methods import LEVELS, METHODS

SPEC = ImageSpec(("a", "b", "c"), (3, 12, 12), (0.5,) * 3, (0.25,) * 3)
IMAGES, STEPS, EXPERTS = 4, 3, 3
ATTACK = 1 + STEPS  # forward passes: the clean reference, and one for each step
DENSE = 6  # convolutions of the small ResNet
MOE, PLAIN = 4, 3  # routed convolutions and others in its MoE network, which has one more projection
OTHERS = (EXPERTS - 1) * MOE  # further convolutions in the backward pass through the straight-through gate
ops = torch.ops.aten
READS = {ops._local_scalar_dense.default, ops.nonzero.default, ops.bincount.default}  # each makes the host wait for a GPU


class PassCounter(TorchDispatchMode):
    """Counts images through convolutions (for each output and gradient), norms that compute statistics, and reads."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is ops.convolution.default:
            self.counts["forward"] += len(args[0])
        elif function is ops.convolution_backward.default:
            for part, needed in zip(("to_input", "to_filters", "to_bias"), args[10], strict=True):
                self.counts[part] += needed * len(args[0])
        elif function is ops.native_batch_norm.default:
            self.counts["statistics"] += args[5]
        self.counts["reads"] += function in READS
        return function(*args, **(kwargs or {}))


def make_state(method, phase=0, *, dispatch="split", fused=None, loss=None, **model):
    """The method's small ResNet with calibrated statistics and different experts."""
    torch.manual_seed(0)
    model = ModelConfig(backbone=SMALL_RESNET, width=4, num_experts=EXPERTS, bank="disjoint", **model)
    config = RunConfig(method=method, model=model, attack=AttackConfig(num_steps=STEPS))
    network = build_model(model, METHODS[method].kind(model), SPEC)
    network.set_dispatch(dispatch)
    with torch.no_grad():
        for layer in network.moe_layers():
            layer.filters.normal_(std=0.3)
        network.train()(torch.rand(8, *SPEC.shape))
    levels = METHODS[method].phases[phase].levels
    optimizers = {level: torch.optim.SGD(LEVELS[level](network), 0.01, 0.9, fused=fused) for level in levels}
    draws, loss_function = BatchDraws(torch.Generator().manual_seed(0)), LOSSES[loss or METHODS[method].loss or "trades"]
    return steps.TrainState(network.eval(), config, loss_function, optimizers, draws, None, 1.0)


def iterate(state, phase=0):
    """The counts of one iteration."""
    phase_of_method = METHODS[state.config.method].phases[phase]
    batches = {level: (torch.rand(IMAGES, *SPEC.shape), torch.randint(3, (IMAGES,))) for level in phase_of_method.levels}
    state.rows = {x: torch.arange(IMAGES) for x, _ in batches.values()}
    with PassCounter() as count:
        phase_of_method.step(state, batches)
    return count.counts


def per_image(counts):
    """The convolutions for one image, and the norms that computed statistics."""
    convolutions = {name: counts[name] / IMAGES for name in ("forward", "to_input", "to_filters", "to_bias")}
    return convolutions | {"statistics": counts["statistics"]}


def expected(forward, to_input, to_filters, statistics):
    return {"forward": forward, "to_input": to_input, "to_filters": to_filters, "to_bias": 0, "statistics": statistics}


def test_standard_training_has_one_forward_and_one_backward_pass():
    counts = iterate(make_state("standard"))
    assert per_image(counts) == expected(DENSE, DENSE - 1, DENSE, DENSE)


@pytest.mark.parametrize(
    ("method", "phase", "to_filters"), [("at_dense", 0, 2), ("at_small_dense", 0, 2), ("at_sparse", 0, 0), ("at_sparse", 1, 2)]
)
def test_one_level_of_trades(method, phase, to_filters):
    counts = iterate(make_state(method, phase), phase)
    inputs = STEPS * DENSE + 2 * (DENSE - 1)  # no gradient to the images in the update
    assert per_image(counts) == expected((ATTACK + 2) * DENSE, inputs, to_filters * DENSE, 2 * DENSE)


def test_pgd_at_needs_no_clean_pass():
    counts = iterate(make_state("at_dense", loss="pgd_at"))
    inputs = STEPS * DENSE + DENSE - 1
    assert per_image(counts) == expected((STEPS + 1) * DENSE, inputs, DENSE, DENSE)


@pytest.mark.parametrize("norms", ["shared", "per_expert"])
def test_at_moe(norms):
    counts = iterate(make_state("at_moe", norms=norms))
    forward = (ATTACK + 2) * (MOE + PLAIN) + STEPS * OTHERS
    # with separate norms the update needs every expert's output, which one wide convolution gives; with shared norms only
    # the backward pass needs the other experts
    forward += 0 if norms == "per_expert" else 2 * OTHERS
    inputs = STEPS * (MOE + PLAIN) + 2 * (MOE + PLAIN - 1)
    statistics = 2 * (PLAIN if norms == "per_expert" else MOE + PLAIN)
    assert per_image(counts) == expected(forward, inputs, 2 * (MOE + PLAIN), statistics)


@pytest.mark.parametrize("norms", ["shared", "per_expert"])
def test_advmoe(norms):
    counts = iterate(make_state("advmoe", norms=norms))
    forward = 2 * (ATTACK + 2) * (MOE + PLAIN) + (STEPS + 2) * OTHERS  # two levels; the other experts only in the routers' level
    routers = 2 * (MOE + PLAIN - 2)  # no router acts before the stem and the first projection
    inputs = 2 * STEPS * (MOE + PLAIN) + routers + 2 * (MOE + PLAIN - 1)
    statistics = 2 * (PLAIN if norms == "per_expert" else MOE + PLAIN)
    assert per_image(counts) == expected(forward, inputs, 2 * (MOE + PLAIN), statistics)


def with_options(state, **options):
    state.config = state.config.replace(training=state.config.training.replace(**options))
    if state.config.training.ema:
        state.ema = Ema(state.model, state.config.training.ema)
    return state


def state_with_teacher(precomputed=None):
    """The state of a dense network with a dense teacher."""
    state = make_state("at_dense")
    state.teacher = Teacher(fused(make_state("at_dense").model), "", None, precomputed)
    state.loss = RSLAD
    return state


def test_a_teachers_pass_replaces_the_clean_reference_and_precomputed_probabilities_need_none():
    plain = iterate(make_state("at_dense"))
    computed, precomputed = iterate(state_with_teacher()), iterate(state_with_teacher(torch.full((IMAGES, 3), 1 / 3)))
    assert per_image(computed) == per_image(plain)
    assert plain["forward"] - precomputed["forward"] == IMAGES * DENSE


def with_groups(state):
    state.groups = torch.tensor([0, 1, 0])
    return state


@pytest.mark.parametrize(
    ("options", "passes", "back"),
    [
        ({"ema": 0.9, "label_smoothing": 0.1}, 0, 0),
        ({"ema": 0.9, "soft_labels": "adr"}, 1, 0),  # a forward pass of the average
        ({"awp": 0.01}, 2, 2),  # the update's passes once more, at the weights that are not perturbed
        ({"awp": 0.01, "awp_from": 0.9}, 2, 2),
    ],
)
def test_the_further_passes_of_ingredients_in_a_dense_network(options, passes, back):
    counts = per_image(iterate(with_options(make_state("at_dense"), **options)))
    inputs = STEPS * DENSE + (2 + back) * (DENSE - 1)
    assert counts == expected((ATTACK + 2 + passes) * DENSE, inputs, (2 + back) * DENSE, (2 + back) * DENSE)


@pytest.mark.parametrize(("ramp", "attack_steps"), [({"epsilon_ramp": 1.0}, STEPS), ({"steps_ramp": 0.5}, steps.LATE_STEPS)])
def test_the_further_passes_of_the_ramps(ramp, attack_steps):
    state = make_state("at_dense")
    state.config, state.done = state.config.replace(attack=state.config.attack.replace(**ramp)), 0.5
    inputs = attack_steps * DENSE + 2 * (DENSE - 1)
    assert per_image(iterate(state)) == expected((1 + attack_steps + 2) * DENSE, inputs, 2 * DENSE, 2 * DENSE)


def test_the_further_passes_of_ingredients_in_advmoe():
    plain = iterate(make_state("advmoe", norms="shared"))
    terms = {"router_target": "label_mod_n", "router_consistency": 1.0, "router_margin": 1.0, "balance": "switch"}
    alone = with_options(make_state("advmoe", norms="shared"), router_loss="target", **terms)
    unused = 2 * (EXPERTS - 1)  # of the last layer, in both passes: no router learns from its output
    assert plain["forward"] - iterate(alone)["forward"] == IMAGES * unused
    assert iterate(with_options(make_state("advmoe", norms="shared"), **terms))["forward"] == plain["forward"]
    confusion = with_options(make_state("advmoe", norms="shared"), router_target="confusion")
    assert [iterate(confusion)["forward"], iterate(with_groups(confusion))["forward"]] == [plain["forward"]] * 2
    for gate, others in (("straight_through", (OTHERS, OTHERS)), ("alternate", (0, OTHERS))):  # in even and odd iterations
        through = with_options(make_state("advmoe", norms="shared"), weight_attack_gate=gate)
        for through.iteration, further in enumerate(others):
            assert iterate(through)["forward"] - plain["forward"] == IMAGES * STEPS * further
    runner_up = iterate(with_options(make_state("advmoe", norms="shared"), runner_up_consistency=1.0))
    assert runner_up["forward"] - plain["forward"] == IMAGES * (MOE + PLAIN)
    awp = with_options(make_state("advmoe", norms="shared"), awp=0.01, awp_routers=True)  # the passes of both updates once more
    assert iterate(awp)["forward"] - plain["forward"] == IMAGES * (4 * (MOE + PLAIN) + 2 * OTHERS)
    rest = with_options(make_state("advmoe", norms="shared"), router_every=2)
    rest.iteration = 1
    assert per_image(iterate(rest))["forward"] == (ATTACK + 2) * (MOE + PLAIN)


def test_awp_does_not_perturb_the_fixed_weights_under_the_masks():
    plain, awp = (iterate(with_options(make_state("at_sparse"), awp=gamma)) for gamma in (0.0, 0.01))
    assert awp["forward"] == plain["forward"]


def test_expert_norms_update_in_the_two_passes_of_the_weights_only(monkeypatch):
    state, updates = make_state("advmoe", norms="per_expert"), []
    monkeypatch.setattr(ExpertNorm, "_update_running", lambda *args: updates.append(args))
    iterate(state)
    assert len(updates) == 2 * MOE


@pytest.mark.parametrize(("method", "copies"), [("standard", 0), ("at_dense", 1), ("advmoe", 1)])
def test_all_attacks_of_a_phase_use_one_fused_copy(method, copies, monkeypatch):
    models, fused = [], steps.fused
    monkeypatch.setattr(steps, "fused", lambda model: models.append(model) or fused(model))
    state = make_state(method)
    for _ in range(2):
        iterate(state)
    assert len(models) == copies


@pytest.mark.parametrize("dispatch", ["wide", "grouped"])
@pytest.mark.parametrize("method", METHODS)
def test_an_iteration_reads_the_device_once_and_its_attacks_never(method, dispatch):
    state = make_state(method, dispatch=dispatch, fused=True, norms="shared")
    loss, reads = state.loss, []

    def attack(*args):
        with PassCounter() as count:
            x_adv = loss.attack(*args)
        reads.append(count.counts["reads"])
        return x_adv

    state.loss = Loss(loss.attack and attack, loss.value)
    assert iterate(state)["reads"] == 1
    assert reads == [0] * (0 if method == "standard" else 2 if method == "advmoe" else 1)


def test_an_iteration_of_the_loop_reads_no_more(tiny, splits, tmp_path):
    count = PassCounter()

    class Reader(Recorder):
        def iteration(self, *args):
            self.notes.append(count.counts["reads"])

    reader = Reader()
    with count:
        train(tiny("at_dense", epochs=1), splits, tmp_path / "run", reader)
    first, second, third = reader.notes
    assert (second - first, third - second) == (1, 1)


@pytest.mark.parametrize("broken", ["routers", "weights"])
@pytest.mark.parametrize("order", ["routers_first", "weights_first"])
def test_fused_optimizers_change_no_parameter_after_a_nan(order, broken):
    state = make_state("advmoe", fused=True, dispatch="wide", norms="shared")
    state.config = RunConfig(attack=state.config.attack, training=type(state.config.training)(level_order=order))
    iterate(state)
    loss_value, parameters = state.loss.value, []

    def value(*args):
        outcome = loss_value(*args)
        level = ["routers", "weights"][len(parameters) != (order == "weights_first")]
        parameters.append({name: p.detach().clone() for name, p in state.model.named_parameters()})
        return outcome._replace(total=outcome.total * torch.nan) if level == broken else outcome

    state.loss = Loss(state.loss.attack, value)
    with pytest.raises(NonFinite, match=rf"loss \({broken} update\)"):
        iterate(state)
    first = broken == order.removesuffix("_first")
    changed = {name for name, p in state.model.named_parameters() if not torch.equal(p, parameters[0][name])}
    assert bool(changed) != first  # if the second level fails, the first level's update stays
    assert all(torch.equal(p, parameters[1][name]) for name, p in state.model.named_parameters())

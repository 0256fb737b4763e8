"""What one iteration of each method computes: images through convolutions, batch norm statistics, looks at the device."""

from collections import Counter

import pytest
import torch
from recorder import Recorder
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
ATTACK = 1 + STEPS  # forward passes: the clean reference, and each step's
DENSE = 20  # convolutions of ResNet-18
MOE, PLAIN = 16, 5  # routed and others in its MoE network, which has one projection more
OTHERS = (EXPERTS - 1) * MOE  # what a pass through the straight-through gate computes beside, on its way back
ops = torch.ops.aten
READS = {ops._local_scalar_dense.default, ops.nonzero.default, ops.bincount.default}  # each makes the host wait for a GPU


class Count(TorchDispatchMode):
    """Images through convolutions (each times what is asked of it), norms that take statistics, reads of a device's values."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is ops.convolution.default:
            self.seen["forward"] += len(args[0])
        elif function is ops.convolution_backward.default:
            for part, wanted in zip(("to_input", "to_filters", "to_bias"), args[10], strict=True):
                self.seen[part] += wanted * len(args[0])
        elif function is ops.native_batch_norm.default:
            self.seen["statistics"] += args[5]
        self.seen["reads"] += function in READS
        return function(*args, **(kwargs or {}))


def make_state(method, phase=0, *, dispatch="split", fused=None, loss=None, **model):
    """The method's ResNet-18, of few channels, with statistics and experts that differ."""
    torch.manual_seed(0)
    model = ModelConfig(width=4, num_experts=EXPERTS, bank="disjoint", **model)
    config = RunConfig(method=method, model=model, attack=AttackConfig(num_steps=STEPS))
    network = build_model(model, METHODS[method].kind(model), SPEC)
    network.set_dispatch(dispatch)
    with torch.no_grad():
        for layer in network.moe_layers():
            layer.filters.normal_(std=0.3)
        network.train()(torch.rand(8, *SPEC.shape))
    levels = METHODS[method].phases[phase].levels
    optimizers = {level: torch.optim.SGD(LEVELS[level](network), 0.01, 0.9, fused=fused) for level in levels}
    draws, chosen = BatchDraws(torch.Generator().manual_seed(0)), LOSSES[loss or METHODS[method].loss or "trades"]
    return steps.TrainState(network.eval(), config, chosen, optimizers, draws, None, 1.0)


def iterate(state, phase=0):
    """What one iteration does."""
    own = METHODS[state.config.method].phases[phase]
    batches = {level: (torch.rand(IMAGES, *SPEC.shape), torch.randint(3, (IMAGES,))) for level in own.levels}
    with Count() as count:
        own.step(state, batches)
    return count.seen


def counted(seen):
    """The convolutions an image, and the norms that took statistics."""
    convolutions = {name: seen[name] / IMAGES for name in ("forward", "to_input", "to_filters", "to_bias")}
    return convolutions | {"statistics": seen["statistics"]}


def wanted(forward, to_input, to_filters, statistics):
    return {"forward": forward, "to_input": to_input, "to_filters": to_filters, "to_bias": 0, "statistics": statistics}


def test_standard_training_passes_once_and_back():
    seen = iterate(make_state("standard"))
    assert counted(seen) == wanted(DENSE, DENSE - 1, DENSE, DENSE)


@pytest.mark.parametrize(
    ("method", "phase", "to_filters"), [("at_dense", 0, 2), ("at_small_dense", 0, 2), ("at_sparse", 0, 0), ("at_sparse", 1, 2)]
)
def test_one_level_of_trades(method, phase, to_filters):
    seen = iterate(make_state(method, phase), phase)
    inputs = STEPS * DENSE + 2 * (DENSE - 1)  # no gradient to the images in the update
    assert counted(seen) == wanted((ATTACK + 2) * DENSE, inputs, to_filters * DENSE, 2 * DENSE)


def test_pgd_at_needs_no_clean_pass():
    seen = iterate(make_state("at_dense", loss="pgd_at"))
    inputs = STEPS * DENSE + DENSE - 1
    assert counted(seen) == wanted((STEPS + 1) * DENSE, inputs, DENSE, DENSE)


@pytest.mark.parametrize("norms", ["shared", "per_expert"])
def test_at_moe(norms):
    seen = iterate(make_state("at_moe", norms=norms))
    forward = (ATTACK + 2) * (MOE + PLAIN) + STEPS * OTHERS
    # norms of the experts' own need every expert's output in the update, which one wide convolution gives; else it is the
    # way back that needs the others
    forward += 0 if norms == "per_expert" else 2 * OTHERS
    inputs = STEPS * (MOE + PLAIN) + 2 * (MOE + PLAIN - 1)
    statistics = 2 * (PLAIN if norms == "per_expert" else MOE + PLAIN)
    assert counted(seen) == wanted(forward, inputs, 2 * (MOE + PLAIN), statistics)


@pytest.mark.parametrize("norms", ["shared", "per_expert"])
def test_advmoe(norms):
    seen = iterate(make_state("advmoe", norms=norms))
    forward = 2 * (ATTACK + 2) * (MOE + PLAIN) + (STEPS + 2) * OTHERS  # two levels, the others in the routers' alone
    routers = 2 * (MOE + PLAIN - 2)  # the stem and the first projection read what no router has touched
    inputs = 2 * STEPS * (MOE + PLAIN) + routers + 2 * (MOE + PLAIN - 1)
    statistics = 2 * (PLAIN if norms == "per_expert" else MOE + PLAIN)
    assert counted(seen) == wanted(forward, inputs, 2 * (MOE + PLAIN), statistics)


def with_options(state, **options):
    state.config = state.config.replace(training=state.config.training.replace(**options))
    if state.config.training.ema:
        state.ema = Ema(state.model, state.config.training.ema)
    return state


def taught(answers=None):
    """A dense network that has a dense teacher."""
    state = make_state("at_dense")
    state.teacher = Teacher(fused(make_state("at_dense").model), "", None, answers)
    state.loss, state.rows = RSLAD, {"all": torch.arange(IMAGES)}
    return state


def test_a_teacher_takes_one_pass_in_place_of_the_clean_reference_or_none_if_its_probabilities_are_known():
    plain = iterate(make_state("at_dense"))
    asked, known = iterate(taught()), iterate(taught(torch.full((IMAGES, 3), 1 / 3)))
    assert counted(asked) == counted(plain)
    assert plain["forward"] - known["forward"] == IMAGES * DENSE


def grouped(state):
    state.groups = torch.tensor([0, 1, 0])
    return state


@pytest.mark.parametrize(
    ("options", "passes", "back"),
    [
        ({"ema": 0.9, "label_smoothing": 0.1}, 0, 0),
        ({"ema": 0.9, "soft_labels": "adr"}, 1, 0),  # a forward pass of the average
        ({"awp": 0.01}, 2, 2),  # the update's passes once more, at the weights that are not perturbed
        ({"awp": 0.01, "awp_from": 1.0}, 2, 2),
    ],
)
def test_what_ingredients_add_to_a_dense_network(options, passes, back):
    seen = counted(iterate(with_options(make_state("at_dense"), **options)))
    inputs = STEPS * DENSE + (2 + back) * (DENSE - 1)
    assert seen == wanted((ATTACK + 2 + passes) * DENSE, inputs, (2 + back) * DENSE, (2 + back) * DENSE)


def test_what_ingredients_add_to_advmoe():
    plain = iterate(make_state("advmoe", norms="shared"))
    terms = {"router_target": "label_mod_n", "router_consistency": 1.0, "router_margin": 1.0}
    assert iterate(with_options(make_state("advmoe", norms="shared"), **terms))["forward"] == plain["forward"]
    confusion = with_options(make_state("advmoe", norms="shared"), router_target="confusion")
    assert [iterate(confusion)["forward"], iterate(grouped(confusion))["forward"]] == [plain["forward"]] * 2
    through = iterate(with_options(make_state("advmoe", norms="shared"), weight_attack_gate="straight_through"))
    assert through["forward"] - plain["forward"] == IMAGES * STEPS * OTHERS
    runner_up = iterate(with_options(make_state("advmoe", norms="shared"), runner_up_consistency=1.0))
    assert runner_up["forward"] - plain["forward"] == IMAGES * (MOE + PLAIN)
    awp = with_options(make_state("advmoe", norms="shared"), awp=0.01, awp_routers=True)  # both updates' passes once more
    assert iterate(awp)["forward"] - plain["forward"] == IMAGES * (4 * (MOE + PLAIN) + 2 * OTHERS)
    rest = with_options(make_state("advmoe", norms="shared"), router_every=2)
    rest.iteration = 1
    assert counted(iterate(rest))["forward"] == (ATTACK + 2) * (MOE + PLAIN)


def test_expert_norms_update_in_the_two_passes_of_the_weights_only(monkeypatch):
    state, updates = make_state("advmoe", norms="per_expert"), []
    monkeypatch.setattr(ExpertNorm, "_update_running", lambda *given: updates.append(given))
    iterate(state)
    assert len(updates) == 2 * MOE


@pytest.mark.parametrize(("method", "twins"), [("standard", 0), ("at_dense", 1), ("advmoe", 1)])
def test_one_twin_serves_all_attacks_of_a_phase(method, twins, monkeypatch):
    made, fused = [], steps.fused
    monkeypatch.setattr(steps, "fused", lambda model: made.append(model) or fused(model))
    state = make_state(method)
    for _ in range(2):
        iterate(state)
    assert len(made) == twins


@pytest.mark.parametrize("dispatch", ["wide", "grouped"])
@pytest.mark.parametrize("method", METHODS)
def test_an_iteration_reads_the_device_once_and_its_attacks_never(method, dispatch):
    state = make_state(method, dispatch=dispatch, fused=True, norms="shared")
    inner, reads = state.loss, []

    def attack(*given):
        with Count() as count:
            x_adv = inner.attack(*given)
        reads.append(count.seen["reads"])
        return x_adv

    state.loss = Loss(inner.attack and attack, inner.value)
    assert iterate(state)["reads"] == 1
    assert reads == [0] * (0 if method == "standard" else 2 if method == "advmoe" else 1)


def test_an_iteration_of_the_loop_reads_no_more(tiny, splits, tmp_path):
    count = Count()

    class Reader(Recorder):
        def iteration(self, *given):
            self.notes.append(count.seen["reads"])

    reader = Reader()
    with count:
        train(tiny("at_dense", epochs=1), splits, tmp_path / "run", reader)
    first, second, third = reader.notes
    assert (second - first, third - second) == (1, 1)


@pytest.mark.parametrize("broken", ["routers", "weights"])
@pytest.mark.parametrize("order", ["routers_first", "weights_first"])
def test_fused_optimizers_leave_every_parameter_alone_from_the_first_nan_on(order, broken):
    state = make_state("advmoe", fused=True, dispatch="wide", norms="shared")
    state.config = RunConfig(attack=state.config.attack, training=type(state.config.training)(level_order=order))
    iterate(state)
    inner, seen = state.loss.value, []

    def value(*given):
        outcome = inner(*given)
        level = ["routers", "weights"][len(seen) != (order == "weights_first")]
        seen.append({name: p.detach().clone() for name, p in state.model.named_parameters()})
        return outcome._replace(total=outcome.total * torch.nan) if level == broken else outcome

    state.loss = Loss(state.loss.attack, value)
    with pytest.raises(NonFinite, match=rf"loss \({broken} update\)"):
        iterate(state)
    first = broken == order.removesuffix("_first")
    left = {name for name, p in state.model.named_parameters() if not torch.equal(p, seen[0][name])}
    assert bool(left) != first  # what the first level learned stays where the second breaks
    assert all(torch.equal(p, seen[1][name]) for name, p in state.model.named_parameters())

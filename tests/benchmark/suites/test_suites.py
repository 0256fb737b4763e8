from functools import partial

import pytest
import torch

from advmoe.benchmark import variants
from advmoe.benchmark.memory import Probe
from advmoe.benchmark.setup import QUICK as TOY
from advmoe.benchmark.setup import Scale, Setup
from advmoe.benchmark.suites import SUITES, inference, iteration, memory, training
from advmoe.benchmark.variants import KINDS
from advmoe.models.routed import RoutedConv2d

CPU = torch.device("cpu")


def rows(suite):
    return list(SUITES[suite].measure(Setup(scale=TOY)))


def targets(suite):
    return {row.name: row.target for row in rows(suite) if row.unit == "ratio"}


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(inference, "has_compiler", lambda: False)
    monkeypatch.setattr(training, "has_compiler", lambda: False)


@pytest.mark.usefixtures("no_compiler", "small_networks")
def test_inference():
    assert targets("inference") == {
        "ResNet-18, batch 4: dense / MoE": ">= 3.0",
        "ResNet-18, batch 4: MoE / small dense": "<= 1.3",
        "ResNet-18, batch 4: 16 experts / MoE": "<= 1.3",
        "ResNet-18, batch 4, all on one expert: MoE / small dense": "<= 1.12",
        "ResNet-18, batch 1: dense / MoE": ">= 2.2",
        "ResNet-18, batch 1: MoE / small dense": None,
        "WRN-28-10, batch 4: dense / MoE": ">= 3.3",
        "ResNet-18, batch 4, bf16: dense bf16 / dense": None,
        "ResNet-18, batch 4, bf16: MoE bf16 / MoE": None,
    }


@pytest.mark.usefixtures("small_networks")
def test_compiled_variants_are_measured_if_there_is_a_compiler(monkeypatch):
    compiled = []
    monkeypatch.setattr(inference, "has_compiler", lambda: True)
    monkeypatch.setattr(variants.torch, "compile", lambda call, **options: (compiled.append(options), call)[1])
    assert {name: target for name, target in targets("inference").items() if "compiled" in name} == {
        "ResNet-18, batch 4, compiled: dense compiled / MoE compiled": None,
        "ResNet-18, batch 4, compiled: dense compiled / dense": None,
        "ResNet-18, batch 4, compiled: MoE compiled / MoE": None,
    }
    assert compiled == [{"dynamic": False, "fullgraph": True}] * 2


@pytest.mark.usefixtures("no_compiler", "small_networks")
def test_training():
    assert targets("training") == {
        "iteration, ResNet-18, batch 6: AdvMoE / AT (Dense)": "<= 0.75",
        "iteration, ResNet-18, batch 6: AdvMoE / AT (S-Dense)": "<= 2.4",
        "iteration, ResNet-18, batch 6, bf16: AdvMoE / AdvMoE bf16": ">= 2.0",
        "iteration, ResNet-18, batch 6, bf16: AT (Dense) / AT (Dense) bf16": None,
    }


def test_a_compiled_iteration_is_measured_if_there_is_a_compiler(monkeypatch):
    compiled = []
    monkeypatch.setattr(training, "has_compiler", lambda: True)
    monkeypatch.setattr(training.variants, "iteration", lambda config, *_: lambda: compiled.append(config.runtime.compile))
    assert targets("training")["iteration, ResNet-18, batch 6, compiled: AdvMoE / AdvMoE inductor"] is None
    assert compiled.count("inductor") == TOY.warm_up + TOY.rounds


def test_memory(monkeypatch):
    peaks = {"advmoe": 300, "at_dense": 500}
    monkeypatch.setattr(memory, "measurable", lambda device: True)
    monkeypatch.setattr(memory, "probe", lambda config, *_: Probe(memory=peaks[config.method], seconds=1.0))
    advmoe, dense, ratio = rows("memory")
    assert (advmoe.unit, advmoe.value, dense.value) == ("bytes", 300, 500)
    assert (ratio.value, ratio.target, ratio.met) == (0.6, "<= 0.72", True)
    probed = []
    monkeypatch.setattr(memory, "probe", lambda config, *_: probed.append(config) or Probe(memory=1, seconds=1.0))
    list(memory.measure(Setup(scale=Scale(rounds=5))))
    assert len(probed) == 2 * 5
    monkeypatch.setattr(memory, "measurable", lambda device: False)
    assert rows("memory") == []


def test_attack_compares_rates():
    values = {row.what: row for row in rows("attack")}
    assert {row.case for row in values.values()} == {"PGD-2 images a second, batch 2"}
    assert values["MoE"].unit == "images/s"
    assert values["MoE / small dense"].target == ">= 0.75"
    assert values["MoE / MoE unfolded"].target is None
    assert values["MoE / small dense"].value == pytest.approx(values["MoE"].value / values["small dense"].value)


@pytest.mark.usefixtures("small_networks")
def test_data():
    assert targets("data") == {"batch 6: loading / AdvMoE iteration": "<= 0.03"}


def test_operators_are_counted_and_their_times_add_up():
    values = {row.name: row.value for row in rows("operators")}
    for kind in ("small dense", "MoE", "MoE, one expert"):
        parts = [value for name, value in values.items() if name.endswith(f": {kind}") and "operators" not in name]
        assert parts[-1] == pytest.approx(sum(parts[:-1]))
        assert values[f"ResNet-18, batch 4, operators: {kind}"] > 40
    assert values["ResNet-18, batch 4, gather: MoE"] > values["ResNet-18, batch 4, gather: MoE, one expert"] == 0


@pytest.mark.usefixtures("small_networks")
def test_the_parts_of_an_iteration_add_up():
    measured = rows("iteration")
    for name in ("AdvMoE", "AT (Dense)", "AT (S-Dense)", "AdvMoE bf16", "AT (S-Dense) bf16"):
        *parts, total = [row.value for row in measured if row.what == name and row.unit == "s"]
        assert total == pytest.approx(sum(parts))
    values = {row.name.removeprefix("iteration, ResNet-18, batch 6, "): row.value for row in measured}
    assert values["gather and scatter: AT (S-Dense)"] == 0
    assert values["batch norm: AdvMoE"] > 0
    assert 1 < values["multiply-accumulates for an image: AdvMoE / AT (S-Dense)"] < 4


def test_multiplications_of_a_grouped_convolution_and_its_gradients():
    x, filters = torch.rand(2, 6, 5, 5, requires_grad=True), torch.rand(4, 3, 3, 3, requires_grad=True)  # two groups

    def call():
        return torch.nn.functional.conv2d(x, filters, padding=1, groups=2).sum()

    forward = 2 * 4 * 25 * 3 * 9
    assert iteration.multiplications(call) == forward
    assert iteration.multiplications(lambda: torch.autograd.grad(call(), x)) == 2 * forward
    assert iteration.multiplications(lambda: call().backward()) == 3 * forward


def test_loading_gives_a_batch_to_each_level_in_every_epoch():
    config = variants.configuration("AdvMoE", TOY)
    load = variants.loading(config, TOY, CPU)
    for _ in range(TOY.images // TOY.training_batch + 3):
        batches = load()
        assert [(tuple(x.shape), x.dtype, len(y)) for x, y in batches] == [((6, 3, 8, 8), torch.float32, 6)] * 2
        assert all(x.min() >= 0 and x.max() <= 1 for x, _ in batches)


@pytest.mark.parametrize("kind", KINDS)
def test_all_variants_are_prepared_alike(kind):
    call = variants.inference(kind, TOY, CPU, "resnet18", 4)
    model, x, choices = call.func, call.args[1], call.args[2]
    assert model is variants.forward
    network = call.args[0].__self__
    assert not network.training
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in network.modules())
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert network.classifier.weight.dtype == torch.float32
    routed = [layer for layer in network.modules() if isinstance(layer, RoutedConv2d)]
    assert choices == ((len(routed[0].experts), len(routed)) if routed else None)
    assert call().is_inference()


def test_bf16_runs_convolutions_in_bf16():
    call = variants.inference("dense", TOY, CPU, "resnet18", 4)
    assert (call().dtype, variants.in_bf16(call)().dtype) == (torch.float32, torch.bfloat16)
    assert variants.bf16(variants.configuration("AdvMoE", TOY)).runtime.precision == "bfloat16"


def test_routes_are_random_and_even():
    routes = []

    def model(x, gate):
        routes.append(gate.route)
        return x, ()

    variants.forward(model, torch.rand(1000, 1), (2, 3))
    assert routes[0].shape == (1000, 3)
    assert routes[0].float().mean(dim=0).tolist() == pytest.approx([0.5] * 3, abs=0.08)


def test_an_iteration_trains_both_levels_and_changes_no_weight():
    step = variants.iteration(variants.configuration("AdvMoE", TOY), TOY.side, CPU)
    assert isinstance(step, partial)
    state = step.args[0]
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    metrics = step()
    assert all(torch.equal(*pair) for pair in zip(before, state.model.parameters(), strict=True))
    assert all(optimizer.state for optimizer in state.optimizers.values())
    assert {"loss", "router_loss"} <= metrics.keys()

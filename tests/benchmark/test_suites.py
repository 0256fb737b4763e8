from functools import partial

import pytest
import torch

from advmoe.benchmark import suites, variants
from advmoe.benchmark.memory import Probe
from advmoe.benchmark.variants import KINDS, Scale

CPU = torch.device("cpu")
TOY = Scale(width=20, side=8, batch=4, training_batch=6, attack_batch=2, attack_steps=2, images=60, rounds=1)


def rows(suite):
    return {row.name: row.target for found in suites.SUITES[suite](TOY, CPU) for row in found.rows}


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(variants, "compiler_found", lambda: False)


@pytest.mark.usefixtures("no_compiler")
def test_inference():
    assert rows("inference") == {
        "ResNet-18, batch 4: dense / MoE": ">= 3.0",
        "ResNet-18, batch 4: MoE / small dense": "<= 1.3",
        "ResNet-18, batch 4: 16 experts / MoE": "<= 1.4",
        "ResNet-18, batch 1: dense / MoE": ">= 1.8",
        "ResNet-18, batch 1: MoE / small dense": None,
        "WRN-28-10, batch 4: dense / MoE": ">= 3.3",
        "ResNet-18, batch 4, bf16: dense bf16 / dense": None,
        "ResNet-18, batch 4, bf16: MoE bf16 / MoE": None,
    }


def test_compiled_variants_are_measured_where_there_is_a_compiler(monkeypatch):
    compiled = []
    monkeypatch.setattr(variants, "compiler_found", lambda: True)
    monkeypatch.setattr(variants.torch, "compile", lambda call, **options: (compiled.append(options), call)[1])
    assert {name: target for name, target in rows("inference").items() if "compiled" in name} == {
        "ResNet-18, batch 4, compiled: dense compiled / MoE compiled": None,
        "ResNet-18, batch 4, compiled: dense compiled / dense": None,
        "ResNet-18, batch 4, compiled: MoE compiled / MoE": None,
    }
    assert compiled == [{"dynamic": False, "fullgraph": True}] * 2


def test_training(monkeypatch):
    held = {"advmoe": 300, "at_dense": 500}
    monkeypatch.setattr(suites, "measurable", lambda device: True)
    monkeypatch.setattr(suites, "probe", lambda config, *_: Probe(held[config.method], 1.0))
    *timings, memory = suites.training(TOY, CPU)
    assert {row.name: row.target for found in timings for row in found.rows} == {
        "iteration, ResNet-18, batch 6: AdvMoE / AT (Dense)": "<= 0.75",
        "iteration, ResNet-18, batch 6: AdvMoE / AT (S-Dense)": "<= 2.9",
        "iteration, ResNet-18, batch 6, bf16: AdvMoE bf16 / AdvMoE": None,
        "iteration, ResNet-18, batch 6, bf16: AT (Dense) bf16 / AT (Dense)": None,
    }
    (row,) = memory.rows
    assert (memory.unit, row.ratio, row.target, row.met) == ("bytes", 0.6, "<= 0.75", True)


def test_attack_compares_rates():
    (found,) = suites.attack(TOY, CPU)
    assert found.unit == "images_per_second"
    assert [(row.name, row.target) for row in found.rows] == [
        ("PGD-2 images a second, batch 2: MoE / small dense", ">= 0.75"),
        ("PGD-2 images a second, batch 2: MoE / MoE unfolded", None),
    ]
    moe, small = found.measured["MoE"], found.measured["small dense"]
    assert found.rows[0].ratio == pytest.approx(moe[0] / small[0])


def test_data():
    assert rows("data") == {"batch 6: loading / AdvMoE iteration": "<= 0.03"}


def test_loading_gives_each_level_its_batch_epoch_after_epoch():
    config = variants.configuration("AdvMoE", TOY)
    load = variants.loading(config, TOY, CPU)
    for _ in range(TOY.images // TOY.training_batch + 3):
        batches = load()
        assert [(tuple(x.shape), x.dtype, len(y)) for x, y in batches] == [((6, 3, 8, 8), torch.float32, 6)] * 2
        assert all(x.min() >= 0 and x.max() <= 1 for x, _ in batches)


@pytest.mark.parametrize("kind", KINDS)
def test_all_variants_get_the_same_treatment(kind):
    call = variants.inference(kind, TOY, CPU, "resnet18", 4)
    model, x, places = call.func, call.args[1], call.args[2]
    assert model is variants.forward
    network = call.args[0].__self__
    assert not network.training
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in network.modules())
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert network.classifier.weight.dtype == torch.float32
    assert (places is None) == (not network.moe_layers())
    assert call().is_inference()


def test_bf16_runs_convolutions_in_bf16():
    call = variants.inference("dense", TOY, CPU, "resnet18", 4)
    assert (call().dtype, variants.in_bf16(call)().dtype) == (torch.float32, torch.bfloat16)
    assert variants.bf16(variants.configuration("AdvMoE", TOY)).runtime.precision == "bfloat16"


def test_routes_are_random_and_even():
    seen = []

    def model(x, gate):
        seen.append(gate.route)
        return x, ()

    variants.forward(model, torch.rand(1000, 1), (2, 3))
    assert seen[0].shape == (1000, 3)
    assert seen[0].float().mean(dim=0).tolist() == pytest.approx([0.5] * 3, abs=0.08)


def test_iteration_learns_next_to_nothing_but_runs():
    step = variants.iteration(variants.configuration("AdvMoE", TOY), TOY.side, CPU)
    assert isinstance(step, partial)
    state = step.args[0]
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    metrics = step()
    changes = [(a - b).abs().max().item() for a, b in zip(before, state.model.parameters(), strict=True)]
    assert 0 < max(changes) < 0.05
    assert {"loss", "router_loss"} <= metrics.keys()

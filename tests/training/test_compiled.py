"""`--compile`: the same numbers as without it, errors, and runs that continue without it.

Most tests use the backend `aot_eager`: like the others it traces a pass with its gradients, but it needs no compiler. `eager`
traces the pass without its gradients.
"""

from functools import partial

import pytest
import torch
from recorder import Recorder
from test_loop import numbers, weights
from test_steps import BATCHES, SIZE, make_state

from advmoe import distributed
from advmoe.config import RuntimeConfig
from advmoe.errors import UserError
from advmoe.models import MODELS
from advmoe.models.resnet import ResNet
from advmoe.training import compiled, loop, trial
from advmoe.training.loop import train
from advmoe.training.methods import METHODS
from advmoe.training.start import network
from advmoe.training.steps import single_level, two_level

CPU = torch.device("cpu")


@pytest.fixture
def backend(monkeypatch):
    """backend(name): use this backend of torch.compile for `inductor`."""

    def use(name):
        torch.compiler.reset()
        compiled.program.cache_clear()
        monkeypatch.setitem(compiled.BACKENDS, "inductor", name)

    yield use
    torch.compiler.reset()
    compiled.program.cache_clear()


def broken(graph, inputs):
    raise RuntimeError("no such instruction\nand more")


@pytest.fixture
def toy(tiny, registries):
    """toy(method, **fields): a run of a network that is traced in seconds."""
    MODELS["toy"] = (partial(ResNet, blocks=(1,)), 4)
    return partial(tiny, backbone="toy", batch_size=25)  # 58 training images: the last batch is smaller


def iterations(mode, step, precision=None, **options):
    """Metrics, parameters and buffers of a tiny network after two iterations."""
    state = make_state(**options, blocks=(1,), batch_size=SIZE, lr=1e-3, router_lr=1e-3)
    state.autocast = precision
    state.model.set_dispatch("wide")
    state.config = state.config.replace(runtime=RuntimeConfig(compile=mode))
    metrics = [step(state, {level: BATCHES[level] for level in state.optimizers}) for _ in range(2)]
    values = {f"{name} {number}": value for number, each in enumerate(metrics) for name, value in each.items()}
    return values | state.model.state_dict()


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (two_level, {"weight_attack_gate": "straight_through"}),
        (single_level, {"levels": ("all",), "loss": "pgd_at", "router_gate": "scaled"}),
    ],
)
def test_traced_passes_give_the_same_bits(backend, step, options):
    backend("aot_eager")
    expected, values = iterations("none", step, **options), iterations("inductor", step, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert expected.keys() == values.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, values[name])] == []


@pytest.mark.skipif(not compiled.has_compiler(), reason="there is no C++ compiler")
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.slow
def test_inductor_gives_the_same_numbers_up_to_rounding(backend, precision):
    backend("inductor")
    expected, values = (iterations(mode, two_level, precision) for mode in ("none", "inductor"))
    error = 2e-5 if precision is None else 2e-2
    for name, value in expected.items():
        torch.testing.assert_close(values[name].double(), value.double(), rtol=error, atol=error, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied_share": 0.9, "tied_statistics": "shared"},
        {"weight_attack_gate": "alternate", "router_attack_gate": "soft"},
    ],
    ids=["default", "tied statistics", "alternate gates"],
)
def test_a_run_compiles_only_in_its_trial_and_can_be_resumed_without_compiling(
    options, backend, toy, splits, tmp_path, monkeypatch
):
    backend("eager")
    programs = []

    def recording(*arguments):
        programs.append((trial.compilable(*arguments), torch._dynamo.utils.counters["stats"]["unique_graphs"]))
        return programs[-1][0]

    monkeypatch.setattr(loop, "compilable", recording)
    config = toy(epochs=1, compile="inductor", **options)
    with pytest.raises(KeyboardInterrupt):
        train(config, splits, tmp_path / "run", Recorder(lambda epoch, done: done == 2))
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert count > 2
    assert programs == [(config, count)]
    (resumed_row,), (direct_row,) = (
        train(toy(epochs=1, **options), splits, tmp_path / name, Recorder(), resume=True) for name in ("run", "direct")
    )
    assert weights(tmp_path / "run").keys() == weights(tmp_path / "direct").keys()
    assert resumed_row["loss"] == pytest.approx(direct_row["loss"], rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"router_loss": "target", "router_target": "confusion"}])
def test_a_trial_updates_routers_that_wait_for_their_groups_in_a_run(options, tiny, splits):
    config = tiny("advmoe", **options)
    metrics = trial.trial(config, network(config, splits.spec), splits.spec, METHODS["advmoe"].phases[0])()
    assert metrics["router_images"] > 0


def test_a_run_that_cannot_be_compiled_continues_without(backend, toy, splits, tmp_path, recorder):
    backend(broken)
    history = train(toy(epochs=1, compile="inductor"), splits, tmp_path / "run", recorder)
    expected = train(toy(epochs=1), splits, tmp_path / "direct", Recorder())
    assert numbers(history) == numbers(expected)
    assert [note for note in recorder.notes if "compile" in note] == [
        "compile inductor failed; the run continues without it: RuntimeError: no such instruction and more"
    ]


@pytest.mark.parametrize(
    ("settings", "device", "message"),
    [
        ({"compile": "graphs"}, "cpu", "compile graphs records CUDA graphs and needs a CUDA device, not cpu"),
        (
            {"compile": "inductor"},
            "cpu",
            r"compile inductor needs a C\+\+ compiler on the CPU: there is no g\+\+",
        ),
        ({"compile": "graphs", "dispatch": "split"}, "cuda", "compile needs a dispatch of static shapes .wide, grouped, triton"),
    ],
)
def test_what_cannot_be_compiled_is_refused(monkeypatch, settings, device, message):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=message):
        compiled.check_compile(RuntimeConfig(**settings), torch.device(device))
    compiled.check_compile(RuntimeConfig(dispatch="split"), CPU)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="compile inductor runs in one process, not in 2"):
        compiled.check_compile(RuntimeConfig(compile="inductor"), CPU)

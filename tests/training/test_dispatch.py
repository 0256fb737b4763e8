"""The measurement of `--dispatch auto`: the code for CUDA, run on the CPU."""

import logging
import math

import pytest
import torch
from small_backbone import SMALL

from advmoe.config import AttackConfig, ModelConfig, RunConfig, TrainingConfig
from advmoe.data import ImageSpec
from advmoe.errors import UserError
from advmoe.moe import DISPATCHES
from advmoe.training import dispatch
from advmoe.training.start import network

SPEC = ImageSpec(tuple("abc"), (1, 8, 8), (0.4,), (0.3,))
CONFIG = RunConfig(
    model=ModelConfig(backbone=SMALL, width=4), attack=AttackConfig(num_steps=1),
    training=TrainingConfig(batch_size=6, ema=0.9, soft_labels="adr"),
)  # fmt: skip


@pytest.fixture
def measured_on_the_cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "is_measured", lambda device: True)
    monkeypatch.setattr(dispatch, "SECONDS", math.inf)  # however slow the machine is


@pytest.mark.parametrize("content", [b"\xff", b"{", b"{}", b" " * 2**17])
def test_a_damaged_choice_is_measured_again(tmp_path, content):
    (tmp_path / dispatch.FILE).write_bytes(content)
    assert dispatch.read(tmp_path / dispatch.FILE) is None


def test_the_first_start_measures_and_later_ones_read_the_result(monkeypatch, tmp_path, measured_on_the_cpu):
    model, random = network(CONFIG, SPEC), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dispatch.set_fastest(CONFIG, tmp_path, model, SPEC)
    result = dispatch.read(tmp_path / dispatch.FILE)
    assert result.seconds.keys() == {"split", "wide", "grouped"}
    assert result.dispatch == min(result.seconds, key=result.seconds.get)
    assert {layer.dispatch for layer in model.moe_layers()} == {result.dispatch}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    monkeypatch.setattr(dispatch, "measure", None)  # a call would raise
    (tmp_path / dispatch.FILE).write_text('{"dispatch": "wide", "device": "cpu", "seconds": {}}')
    dispatch.set_fastest(CONFIG, tmp_path, model, SPEC)
    assert {layer.dispatch for layer in model.moe_layers()} == {"wide"}


def test_a_named_dispatch_and_the_cpu_are_not_measured(tmp_path):
    named = CONFIG.replace(runtime=CONFIG.runtime.replace(dispatch="grouped"))
    for config in (CONFIG, named):
        model = network(config, SPEC)
        dispatch.set_fastest(config, tmp_path, model, SPEC)
        assert {layer.dispatch for layer in model.moe_layers()} == {config.runtime.dispatch}
    assert not list(tmp_path.iterdir())


def test_a_dispatch_that_fails_or_is_wrong_is_skipped_with_a_warning(monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("no compiler\nat line 3")

    wide = DISPATCHES["wide"]
    monkeypatch.setitem(DISPATCHES, "grouped", broken)
    monkeypatch.setitem(DISPATCHES, "wide", lambda x, bank, experts, one_hot: wide(x, bank, 1 - experts, one_hot))
    with caplog.at_level(logging.WARNING, "advmoe"):
        result = dispatch.measure(CONFIG, network(CONFIG, SPEC), SPEC, ["split", "wide", "grouped"], limit=math.inf)
    assert result.seconds.keys() == {"split"}
    assert [record.getMessage() for record in caplog.records] == [
        "dispatch auto: wide is skipped: its values differ from those of split",
        "dispatch auto: grouped is skipped: no compiler at line 3",
    ]


def test_a_dispatch_that_fails_on_another_rank_is_not_timed(monkeypatch, caplog):
    monkeypatch.setattr("advmoe.distributed.maximum", lambda number: 1)
    result = dispatch.measure(CONFIG, network(CONFIG, SPEC), SPEC, ["wide"], limit=math.inf)
    assert (result.dispatch, result.seconds) == ("split", {})
    assert "wide is skipped: it fails in another process" in caplog.text


def test_a_dispatch_that_fails_on_a_full_batch_is_skipped_with_several_ranks_too(monkeypatch, caplog):
    wide = DISPATCHES["wide"]

    def short_of_memory(x, *args):
        if len(x) > dispatch.IMAGES:
            raise RuntimeError("no memory")
        return wide(x, *args)

    for name, answer in (("world_size", lambda: 2), ("rank", lambda: 0), ("maximum", int), ("broadcast", lambda value: value)):
        monkeypatch.setattr(f"advmoe.distributed.{name}", answer)
    monkeypatch.setitem(DISPATCHES, "wide", short_of_memory)
    config = CONFIG.replace(training=CONFIG.training.replace(batch_size=4 * dispatch.IMAGES))
    result = dispatch.measure(config, network(CONFIG, SPEC), SPEC, ["wide"], limit=math.inf)
    assert result.seconds == {}
    assert "wide is skipped: no memory" in caplog.text


def test_an_iteration_that_fails_on_one_of_several_ranks_ends_the_start(monkeypatch):
    """The other ranks wait for its gradients."""

    def broken(*args):
        raise RuntimeError("no memory")

    for name, answer in (("world_size", lambda: 2), ("rank", lambda: 0), ("maximum", int), ("broadcast", lambda value: value)):
        monkeypatch.setattr(f"advmoe.distributed.{name}", answer)
    monkeypatch.setattr(dispatch, "_iteration_seconds", broken)
    with pytest.raises(UserError, match=r"^dispatch auto: wide failed \(no memory\); give --dispatch split$"):
        dispatch.measure(CONFIG, network(CONFIG, SPEC), SPEC, ["wide"], limit=math.inf)


def test_a_dispatch_is_skipped_after_the_time_limit(caplog):
    result = dispatch.measure(CONFIG, network(CONFIG, SPEC), SPEC, ["wide"], limit=0.0)
    assert (result.dispatch, result.seconds) == ("split", {})
    assert "wide is skipped: 0 s have passed" in caplog.text


@pytest.mark.parametrize("content", ["{}", '{"dispatch": "triton", "device": "another machine", "seconds": {}}'])
def test_a_choice_that_cannot_be_read_or_does_not_run_here_is_measured_again(content, monkeypatch, tmp_path, measured_on_the_cpu):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    again = dispatch.Measured(dispatch="wide", device="cpu", seconds={})
    monkeypatch.setattr(dispatch, "measure", lambda *_: again)
    (tmp_path / dispatch.FILE).write_text(content)
    dispatch.set_fastest(CONFIG, tmp_path, network(CONFIG, SPEC), SPEC)
    assert dispatch.read(tmp_path / dispatch.FILE) == again

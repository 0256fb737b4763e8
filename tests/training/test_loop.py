"""The training loop: resuming, the best epoch, errors, health."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recorder import Recorder
from small_backbone import ROUTED, SMALL

from advmoe.errors import UserError
from advmoe.models import MODELS
from advmoe.training.accuracy import correct_flags
from advmoe.training.checkpoint import LOCK, Checkpoint, RunFolder
from advmoe.training.loop import train
from advmoe.training.methods import METHODS
from advmoe.training.precision import autocast_dtype
from advmoe.training.start import best_network, network

SECONDS = {"train_seconds", "validate_seconds"}


def numbers(history):
    """A history without its clock readings."""
    return [{name: value for name, value in row.items() if name not in SECONDS} for row in history]


def weights(run: Path):
    return RunFolder(run).latest().model_state()


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one(method, tiny, splits, tmp_path):
    """Within an epoch. tests/training/test_faults.py and test_phases.py resume between epochs and phases too."""
    config = tiny(method, epochs=1, save_minutes=0.0)
    uninterrupted = train(config, splits, tmp_path / "uninterrupted", Recorder())
    with pytest.raises(KeyboardInterrupt):
        train(config, splits, tmp_path / "resumed", Recorder(lambda epoch, done: done == 2))
    resumed = train(config, splits, tmp_path / "resumed", Recorder(), resume=True)
    assert numbers(resumed) == numbers(uninterrupted)
    expected, state = weights(tmp_path / "uninterrupted"), weights(tmp_path / "resumed")
    assert all(torch.equal(expected[name], state[name]) for name in expected)


def test_dropout_follows_the_seed_and_leaves_the_callers_random_numbers(tiny, splits, tmp_path, monkeypatch):
    def with_dropout(*arguments, **fields):
        model = MODELS[SMALL][0](*arguments, **fields)
        model.classifier = torch.nn.Sequential(torch.nn.Dropout(), model.classifier)
        return model

    monkeypatch.setitem(MODELS, "dropping", (with_dropout, 64))
    config = tiny("at_small_dense", epochs=1, save_minutes=0.0, backbone="dropping")
    random = torch.get_rng_state()
    uninterrupted = train(config, splits, tmp_path / "uninterrupted", Recorder())
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(KeyboardInterrupt):
        train(config, splits, tmp_path / "resumed", Recorder(lambda epoch, done: done == 2))
    torch.rand(3)
    assert numbers(train(config, splits, tmp_path / "resumed", Recorder(), resume=True)) == numbers(uninterrupted)


def test_a_checkpoint_of_a_device_with_fused_steps_is_resumed_without_them(tiny, splits, tmp_path, monkeypatch):
    config = tiny(epochs=1, save_minutes=0.0)
    uninterrupted = train(config, splits, tmp_path / "uninterrupted", Recorder())
    with pytest.raises(KeyboardInterrupt):
        train(config, splits, tmp_path / "resumed", Recorder(lambda epoch, done: done == 2))
    states, step, kinds = Checkpoint.optimizer_states, torch.optim.SGD.step, set()

    def fused(checkpoint):
        content = states(checkpoint)
        for group in (group for optimizer in content.values() for group in optimizer["param_groups"]):
            group["fused"] = True
        return content

    def recording(optimizer, closure=None):
        kinds.update(group["fused"] for group in optimizer.param_groups)
        step(optimizer, closure)

    monkeypatch.setattr(Checkpoint, "optimizer_states", fused)
    monkeypatch.setattr(torch.optim.SGD, "step", recording)
    assert numbers(train(config, splits, tmp_path / "resumed", Recorder(), resume=True)) == numbers(uninterrupted)
    assert kinds == {None}


@pytest.mark.parametrize(
    ("precision", "device", "capability", "expected"),
    [
        ("float32", "cuda", (9, 0), None), ("auto", "cuda", (9, 0), torch.bfloat16), ("auto", "cuda", (7, 5), None),
        ("bfloat16", "cuda:1", (8, 0), torch.bfloat16), ("bfloat16", "cpu", None, torch.bfloat16),
        ("float32", "cpu", None, None),
    ],
)  # fmt: skip
def test_precision_of_a_device(precision, device, capability, expected, tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert autocast_dtype(precision, torch.device(device)) is expected


@pytest.mark.parametrize(("instructions", "expected"), [(True, torch.bfloat16), (False, None)])
def test_auto_precision_on_a_cpu_is_bfloat16_if_it_has_instructions_for_it(instructions, expected, tiny, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    assert autocast_dtype("auto", torch.device("cpu")) is expected


def test_bfloat16_is_refused_on_a_device_without_it(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match=r"^precision: cuda:0 has float32, not bfloat16$"):
        autocast_dtype("bfloat16", torch.device("cuda:0"))


def test_a_refused_precision_creates_no_folder(tiny, splits, tmp_path, monkeypatch):
    monkeypatch.setattr("advmoe.training.precision._has_bfloat16", lambda device: False)
    with pytest.raises(UserError, match="cpu has float32, not bfloat16"):
        train(tiny(precision="bfloat16"), splits, tmp_path / "run", Recorder())
    assert not (tmp_path / "run").exists()


def test_training_in_bfloat16_resumes_bit_by_bit(tiny, splits, tmp_path):
    config = tiny(precision="bfloat16", epochs=1, save_minutes=0.0)
    uninterrupted = train(config, splits, tmp_path / "uninterrupted", Recorder())
    with pytest.raises(KeyboardInterrupt):
        train(config, splits, tmp_path / "resumed", Recorder(lambda epoch, done: done == 2))
    assert numbers(train(config, splits, tmp_path / "resumed", Recorder(), resume=True)) == numbers(uninterrupted)
    expected, state = weights(tmp_path / "uninterrupted"), weights(tmp_path / "resumed")
    assert all(torch.equal(expected[name], state[name]) for name in expected)


def test_the_seed_decides_the_weights(tiny, splits, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny(seed=seed, epochs=1), splits, tmp_path / name, Recorder())
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_finished_run_changes_nothing(tiny, splits, tmp_path, recorder):
    train(tiny(epochs=1), splits, tmp_path / "run", Recorder())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != LOCK}
    history = train(tiny(epochs=1), splits, tmp_path / "run", recorder)
    assert len(history) == 1
    assert recorder.rows == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != LOCK} == before


def test_other_run_in_the_folder_is_refused(tiny, splits, tmp_path):
    train(tiny(epochs=1), splits, tmp_path / "run", Recorder())
    with pytest.raises(UserError, match=r"holds another run \(training.lr: 0.1, not 0.2\)"):
        train(tiny(epochs=1, lr=0.2), splits, tmp_path / "run", Recorder(), resume=True)


def test_unfinished_run_needs_resume(tiny, splits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), splits, tmp_path / "run", Recorder(lambda epoch, done: epoch == 2))
    with pytest.raises(UserError, match="--resume"):
        train(tiny(), splits, tmp_path / "run", Recorder())


def test_changed_data_is_refused(tiny, splits, tmp_path):
    train(tiny(epochs=1), splits, tmp_path / "run", Recorder())
    other = type(splits)(splits.name, splits.spec, "0" * 64, splits.train, splits.val, splits.test)
    with pytest.raises(UserError, match=f"{splits.fingerprint}, not {'0' * 64}"):
        train(tiny(epochs=1), other, tmp_path / "run", Recorder())


def test_the_metrics_file_has_one_line_for_each_epoch(tiny, splits, tmp_path):
    history = train(tiny(epochs=2), splits, tmp_path / "run", Recorder())
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines == history
    assert [row["epoch"] for row in lines] == [1, 2]
    assert all(math.isclose(sum(layer), 1, abs_tol=1e-6) for row in lines for layer in row["load"])


def test_best_network_has_the_weights_of_the_best_epoch(tiny, splits, tmp_path):
    config = tiny("standard")
    history = train(config, splits, tmp_path / "run", Recorder())
    model, epoch = best_network(RunFolder(tmp_path / "run").best(), config, splits), RunFolder(tmp_path / "run").best().epoch
    assert history[epoch - 1]["val_sa"] == max(row["val_sa"] for row in history)
    with torch.no_grad():
        hits = (model(splits.val.pixels()).argmax(dim=1) == splits.val.labels).float().mean().item()
    assert 100 * hits == pytest.approx(history[epoch - 1]["val_sa"])


def test_a_batch_too_large_for_two_levels_creates_no_folder(tiny, splits, tmp_path):
    with pytest.raises(UserError, match="batch_size must be at most half"):
        train(tiny(batch_size=31), splits, tmp_path / "run", Recorder())
    assert not (tmp_path / "run").exists()


def test_diverging_run_stops_with_names_and_keeps_its_checkpoint(tiny, splits, tmp_path, monkeypatch):
    config = tiny("at_dense")
    with pytest.raises(KeyboardInterrupt):
        train(config, splits, tmp_path / "run", Recorder(lambda epoch, done: epoch == 2))
    step = torch.optim.SGD.step

    def poison(optimizer, closure=None):
        step(optimizer, closure)
        optimizer.param_groups[0]["params"][0].data[0] = math.nan

    monkeypatch.setattr(torch.optim.SGD, "step", poison)
    with pytest.raises(UserError, match=r"epoch 2: iteration 2 of 3: .* is not finite; last good checkpoint: epoch-0001 in"):
        train(config, splits, tmp_path / "run", Recorder(), resume=True)
    assert RunFolder(tmp_path / "run").latest().epoch == 1


def test_a_collapse_gives_one_warning_for_each_epoch(tiny, splits, tmp_path, recorder, monkeypatch):
    config = tiny(epochs=1)

    def biased(config, spec):
        model = network(config, spec)
        for layer in model.moe_layers():
            layer.router.linear.bias.data[0] = 100.0
        return model

    monkeypatch.setattr("advmoe.training.start.network", biased)
    train(config, splits, tmp_path / "run", recorder)
    assert len(recorder.notes) == ROUTED
    assert "router 0 sends 100% of the images to expert 0" in recorder.notes[0]


def test_router_loss_is_a_mean_over_the_images_that_update_the_routers(tiny, splits, tmp_path, recorder):
    train(tiny(tied_share=0.5, lr=0.0, router_lr=0.0), splits, tmp_path / "run", recorder)
    tied, half, free = recorder.rows
    assert "router_loss" not in tied
    assert half["router_loss"] == pytest.approx(free["router_loss"], rel=0.2)


@pytest.mark.parametrize(
    ("backbone", "width", "method"),
    [
        ("resnet18", 4, "advmoe"), ("resnet18", 4, "at_sparse"), ("wrn28_10", 20, "advmoe"), ("vgg16_bn", 4, "at_sparse"),
        ("densenet40", 4, "at_sparse"), ("densenet40", 4, "advmoe"),
        pytest.param("densenet121", 4, "at_sparse", marks=pytest.mark.slow),  # DenseNet's code, as densenet40
    ],
)  # fmt: skip
def test_every_backbone_trains_and_is_loaded(backbone, width, method, tiny, splits, tmp_path):
    config = tiny(method, backbone=backbone, width=width, epochs=1, batch_size=10 if method == "advmoe" else 20)
    few = splits.train[torch.arange(20)]
    splits = replace(splits, train=few, val=few)
    history = train(config, splits, tmp_path / "run", Recorder())
    model, epoch = best_network(RunFolder(tmp_path / "run").best(), config, splits), RunFolder(tmp_path / "run").best().epoch
    assert epoch == len(history)
    assert 100 * correct_flags(model, splits.val).float().mean().item() == pytest.approx(history[-1]["val_sa"], abs=1e-4)

"""Teachers: which ones fit, their probabilities, and their part of the Record."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from recorder import Recorder

from advmoe.config import RunConfig
from advmoe.errors import UserError
from advmoe.evaluation.make_record import Trained, _teacher
from advmoe.models.digest import weights_digest
from advmoe.runs.load import load, save_file
from advmoe.training import labels, steps
from advmoe.training.loop import _iterate, train
from advmoe.training.losses import RSLAD
from advmoe.training.methods import METHODS, Phase
from advmoe.training.start import initial_network, train_state
from advmoe.training.teacher import load_teacher
from advmoe.training.totals import Totals

BFLOAT16 = {"rtol": 0.02, "atol": 0.01}  # a teacher computes in bfloat16 if that is faster


@pytest.fixture(scope="module")
def teacher_run(tiny, splits, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    train(tiny("at_dense", backbone="resnet18", epochs=1), splits, out, Recorder())
    return out


def test_a_run_and_its_file_are_the_same_teacher(teacher_run, tiny, splits, tmp_path):
    network = load(teacher_run)
    save_file(network, tmp_path / "teacher.safetensors")
    x = splits.test.pixels()
    for source in (teacher_run, tmp_path / "teacher.safetensors"):
        teacher = load_teacher(tiny(teacher=str(source)), splits)
        assert teacher.digest == weights_digest(network.network)
        assert teacher.precomputed is None
        torch.testing.assert_close(teacher.probabilities(x), network(x).softmax(dim=1), **BFLOAT16)
        assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert load_teacher(tiny(), splits) is None


def test_probabilities_are_computed_once_if_images_never_change(teacher_run, tiny, splits):
    fixed = tiny(teacher=str(teacher_run), crop_padding=0, flip=False)
    teacher, rows = load_teacher(fixed, splits), torch.tensor([7, 3])
    assert teacher.precomputed.shape == (len(splits.train), 10)
    x = splits.train[rows].pixels()
    torch.testing.assert_close(teacher.probabilities(x, rows), replace(teacher, precomputed=None).probabilities(x), **BFLOAT16)
    (batch,) = splits.train.augmented([rows.numpy()], [0], fixed.data)
    assert torch.equal(batch.raw, splits.train[rows].raw)
    assert torch.equal(batch.rows, rows)
    for options in ({"flip": True}, {"crop_padding": 1}, {"augment": "crop_shift"}):
        changing = fixed.replace(data=fixed.data.replace(**options))
        assert load_teacher(changing, splits).precomputed is None


def test_probabilities_replace_the_labels_in_attack_and_loss(teacher_run, tiny, splits):
    config, targets_seen = tiny("at_dense", teacher=str(teacher_run), label_smoothing=0.2), []
    state = train_state(config, initial_network(config, splits), METHODS["at_dense"].phases[0])
    state.teacher = load_teacher(config, splits)
    assert state.loss is RSLAD

    def attack(forward, x, targets, *rest):
        targets_seen.append(targets)
        return RSLAD.attack(forward, x, targets, *rest)

    def value(forward, x, x_adv, targets, beta):
        targets_seen.append(targets)
        return RSLAD.value(forward, x, x_adv, targets, beta)

    state.loss = replace(RSLAD, attack=attack, value=value)
    x, y = splits.train[torch.arange(8)].pixels(), splits.train.labels[:8]
    steps.single_level(state, {"all": (x, y)})
    expected = 0.8 * state.teacher.probabilities(x) + 0.02
    assert all(torch.equal(targets, targets_seen[0]) for targets in targets_seen)
    torch.testing.assert_close(targets_seen[0], expected)
    torch.testing.assert_close(labels.smoothed(expected, 0.0), expected)


def test_a_step_may_give_a_level_the_batch_of_another(teacher_run, tiny, splits):
    """Probabilities that are computed once are those of the images in the loss."""
    seen = []

    def value(forward, x, x_adv, targets, beta):
        seen.append((x, targets))
        return RSLAD.value(forward, x, x_adv, targets, beta)

    def exchanged(state, batches):
        return steps.two_level(state, {"routers": batches["weights"], "weights": batches["routers"]})

    config = tiny(teacher=str(teacher_run), crop_padding=0, flip=False, tied_share=0.0)
    phase = Phase(exchanged, ("routers", "weights"))
    state = train_state(config, initial_network(config, splits), phase)
    state.loss, state.teacher = replace(RSLAD, value=value), load_teacher(config, splits)
    drawn = tuple(next(splits.train.augmented([np.arange(first, first + 8)], [0], config.data)) for first in (0, 8))
    _iterate(state, phase, iter([drawn]), Totals())
    for (x, targets), first in zip(seen, (8, 0), strict=True):
        assert torch.equal(x, drawn[first // 8].pixels())
        assert torch.equal(targets, state.teacher.precomputed[first : first + 8])


@pytest.mark.parametrize("end", [(1, 2), (2, 1)])
def test_a_run_records_its_teacher_and_refuses_another_one(end, teacher_run, tiny, splits, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_run, teacher)
    config = tiny("at_small_dense", teacher=str(teacher), epochs=2, save_minutes=0.0)
    with pytest.raises(KeyboardInterrupt):
        train(config, splits, tmp_path / "run", Recorder(lambda epoch, done: (epoch, done) == end))
    shutil.rmtree(teacher)
    train(tiny("at_dense", epochs=1, seed=1), splits, teacher, Recorder())
    with pytest.raises(UserError, match=r"^teacher .*: its weights have changed since the run began$"):
        train(config, splits, tmp_path / "run", Recorder(), resume=True)
    shutil.rmtree(teacher)
    shutil.copytree(teacher_run, teacher)
    history = train(config, splits, tmp_path / "run", Recorder(), resume=True)
    assert [row["teacher"] for row in history] == 2 * [weights_digest(load(teacher).network)]
    recorded = _teacher(Trained(config, "run", 2, teacher=history[0]["teacher"]))
    assert (recorded.path, recorded.weights) == (str(teacher), weights_digest(load(teacher).network))
    shutil.rmtree(teacher)
    assert train(config, splits, tmp_path / "run", Recorder()) == history  # a finished run does not need it
    assert _teacher(Trained(RunConfig(), "run", 2)) is None


def with_spec(splits, **fields):
    return replace(splits, spec=replace(splits.spec, **fields))


def padded(images):
    """The images with two more pixels on each side."""
    return replace(images, raw=torch.nn.functional.pad(images.raw, (2, 2, 2, 2)))


def test_teachers_that_do_not_fit_are_refused_before_anything_is_written(teacher_run, tiny, splits, tmp_path):
    more = with_spec(splits, classes=(*splits.spec.classes, "hat"))
    renamed = with_spec(splits, classes=("hat", *splits.spec.classes[1:]))
    larger = replace(
        with_spec(splits, shape=(1, 32, 32)), train=padded(splits.train), val=padded(splits.val), test=padded(splits.test)
    )  # fmt: skip
    (tmp_path / "other").write_text("none")
    with_teacher = tiny(teacher=str(teacher_run))
    cases = [
        (with_teacher, more, "teacher .*: has 10 classes, the data 11"),
        (with_teacher, renamed, "teacher .*: has the class '.*' where the data has 'hat'"),
        (with_teacher, larger, r"teacher .*: takes images of shape \(1, 28, 28\), the data has \(1, 32, 32\)"),
        (tiny(teacher=str(tmp_path / "none")), splits, "teacher .*none: no such run's folder or file"),
        (tiny(teacher=str(tmp_path)), splits, "holds no run"),
        (tiny(teacher=str(tmp_path / "other")), splits, "not a safetensors file"),
        (tiny(teacher=str(teacher_run), loss="pgd_at"), splits, "teacher needs the loss trades, not pgd_at"),
        (tiny("standard", teacher=str(teacher_run)), splits, "teacher needs the loss trades, not clean"),
    ]
    for config, data, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            train(config, data, tmp_path / "run", Recorder())
        assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()

"""AT (Sparse): masks in the first phase, weights under fixed masks in the second."""

import json
import math

import pytest
import torch
from recorder import Recorder

from advmoe.errors import UserError
from advmoe.evaluation.cost import cost
from advmoe.models import compact
from advmoe.moe import MaskedNorm
from advmoe.training.checkpoint import RunFolder, load_weights
from advmoe.training.loop import train
from advmoe.training.manifest import Progress
from advmoe.training.start import best_network, network

EPOCHS = 2  # per phase


@pytest.fixture(scope="module")
def config(tiny):
    return tiny("at_sparse", epochs=EPOCHS)


@pytest.fixture(scope="module")
def uninterrupted(config, splits, tmp_path_factory):
    """The folder of an uninterrupted run, and its history."""
    run = tmp_path_factory.mktemp("sparse") / "run"
    return run, train(config, splits, run, Recorder())


def numbers(history):
    return [{name: value for name, value in row.items() if not name.endswith("_seconds")} for row in history]


def interrupted(config, splits, run, epoch, iteration):
    with pytest.raises(KeyboardInterrupt):
        train(config, splits, run, Recorder(lambda *position: position == (epoch, iteration)))
    return RunFolder(run).latest()


def test_rows_have_their_phase_and_each_phase_starts_the_learning_rate_again(uninterrupted, config):
    run, history = uninterrupted
    assert [row["phase"] for row in history] == [1, 1, 2, 2]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert [row["lr"] for row in history[:2]] == [row["lr"] for row in history[2:]]
    assert history[0]["lr"] == pytest.approx(config.training.lr * 0.5 * (1 + math.cos(math.pi * 2 / 6)))  # 3 iterations an epoch
    assert [json.loads(line)["phase"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 1, 2, 2]


def test_the_first_phase_changes_only_scores_and_the_second_only_weights(config, splits, tmp_path):
    start = dict(network(config, splits.spec).named_parameters())
    first_phase = interrupted(config, splits, tmp_path / "run", 3, 1)
    assert first_phase.epoch == 2
    after_masks = first_phase.model_state()
    train(config, splits, tmp_path / "run", Recorder(), resume=True)
    after_weights = RunFolder(tmp_path / "run").latest().model_state()
    scores = {name for name in start if name.startswith("masks.")}
    assert {name for name in start if not torch.equal(after_masks[name], start[name])} == scores
    assert {name for name in start if not torch.equal(after_weights[name], after_masks[name])} == set(start) - scores


@pytest.mark.parametrize(("epoch", "iteration"), [(1, 2), (3, 1), (4, 3)])
def test_a_run_resumed_in_or_between_the_phases_equals_an_uninterrupted_one(
    epoch, iteration, uninterrupted, config, splits, tmp_path
):
    run, history = uninterrupted
    interrupted(config, splits, tmp_path / "run", epoch, iteration)
    resumed = train(config, splits, tmp_path / "run", Recorder(), resume=True)
    assert numbers(resumed) == numbers(history)
    expected, resumed_checkpoint = RunFolder(run).latest(), RunFolder(tmp_path / "run").latest()
    assert all(torch.equal(value, resumed_checkpoint.model_state()[name]) for name, value in expected.model_state().items())
    assert (tmp_path / "run" / "checkpoints/epoch-0004/model.safetensors").read_bytes() == (
        run / "checkpoints/epoch-0004/model.safetensors"
    ).read_bytes()


def test_resume_after_a_kill_between_the_phases(uninterrupted, config, splits, tmp_path):
    class Killed(Recorder):
        def epoch(self, row):
            if row["epoch"] == EPOCHS:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, splits, tmp_path / "run", Killed())
    assert RunFolder(tmp_path / "run").latest().epoch == EPOCHS
    assert numbers(train(config, splits, tmp_path / "run", Recorder(), resume=True)) == numbers(uninterrupted[1])


def test_the_best_epoch_is_of_the_last_phase(uninterrupted, config, splits):
    run, history = uninterrupted
    model, epoch = best_network(RunFolder(run).best(), config, splits), RunFolder(run).best().epoch
    assert epoch in (3, 4)
    assert history[epoch - 1]["score"] == max(row["score"] for row in history[2:])
    assert not model.training


def test_a_better_epoch_of_the_first_phase_is_not_the_best(config, splits, tmp_path):
    run = tmp_path / "run"
    interrupted(config, splits, run, 2, 1)
    folder = RunFolder(run)
    latest = folder.latest()
    history = [{**latest.history[0], "score": 100.0}]
    folder.save(latest.model_state(), latest.optimizer_states(), Progress(history), latest.fingerprint)
    train(config, splits, run, Recorder(), resume=True)
    assert RunFolder(run).best().epoch in (3, 4)


def test_the_evaluated_network_is_compact_at_the_small_dense_cost(uninterrupted, config, splits):
    run, _ = uninterrupted
    model = best_network(RunFolder(run).best(), config, splits)
    assert not any(isinstance(module, MaskedNorm) for module in model.modules())
    small = network(config.replace(method="at_small_dense"), splits.spec)
    assert cost(model, splits.spec.shape) == cost(small, splits.spec.shape)
    full = network(config, splits.spec)
    load_weights(full, RunFolder(run).best())
    x = splits.test.pixels()[:20]
    with torch.no_grad():
        torch.testing.assert_close(model(x), full.eval()(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compact(full)(x), model(x), rtol=0, atol=0)


# init_from


def dense_run(tiny, splits, folder, method="at_dense", **fields):
    train(tiny(method, epochs=1, **fields), splits, folder, Recorder())
    return folder


def test_init_from_starts_at_the_dense_runs_best_weights(tiny, splits, tmp_path):
    source = dense_run(tiny, splits, tmp_path / "dense")
    config = tiny("at_sparse", epochs=1, init_from=str(source))
    state = interrupted(config, splits, tmp_path / "run", 2, 1).model_state()
    dense = RunFolder(source).best().model_state()
    statistics = {name for name in dense if "running_" in name or name.endswith("num_batches_tracked")}
    assert all(torch.equal(state[name], dense[name]) for name in dense if name not in statistics)
    fresh = network(config, splits.spec).state_dict()
    assert not torch.equal(state["stem.weight"], fresh["stem.weight"])


def test_init_from_starts_the_scores_at_its_filters(tiny, splits, tmp_path):
    source = dense_run(tiny, splits, tmp_path / "dense")
    config = tiny("at_sparse", epochs=1, init_from=str(source), lr=0.0)
    state = interrupted(config, splits, tmp_path / "run", 2, 1).model_state()
    norms = RunFolder(source).best().model_state()["layers.0.weight"].flatten(1).norm(dim=1)
    scores = [value for name, value in state.items() if name.startswith("masks.")]
    assert any(torch.equal(score, norms) for score in scores)


@pytest.mark.parametrize("method", ["at_small_dense", "advmoe", "standard"])
def test_init_from_a_run_of_another_method_is_refused(method, tiny, splits, tmp_path):
    source = dense_run(tiny, splits, tmp_path / "other", method)
    assert_refused(
        tiny("at_sparse", init_from=str(source)), splits, tmp_path, f"{source}: init_from needs a run of at_dense, not of {method}"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"width": 8}, "holds another model's weights"),
        ({"activation": "silu"}, "needs a run with activation relu, not silu"),
    ],
)
def test_init_from_another_model_is_refused(model, message, tiny, splits, tmp_path):
    source = dense_run(tiny, splits, tmp_path / "other", **model)
    assert_refused(tiny("at_sparse", init_from=str(source)), splits, tmp_path, message)


def test_init_from_no_run_is_refused(tiny, splits, tmp_path):
    assert_refused(tiny("at_sparse", init_from=str(tmp_path / "none")), splits, tmp_path, "holds no run")


def test_init_from_of_another_method_than_at_sparse_is_refused(tiny, splits, tmp_path):
    assert_refused(tiny("at_dense", init_from="x"), splits, tmp_path, "init_from is for at_sparse, not at_dense")


def assert_refused(config, splits, tmp_path, message):
    with pytest.raises(UserError) as caught:
        train(config, splits, tmp_path / "run", Recorder())
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_continues_without_the_folder_of_init_from(tiny, splits, tmp_path):
    source = dense_run(tiny, splits, tmp_path / "dense")
    config = tiny("at_sparse", epochs=1, init_from=str(source))
    interrupted(config, splits, tmp_path / "run", 2, 1)
    source.rename(tmp_path / "elsewhere")
    assert [row["phase"] for row in train(config, splits, tmp_path / "run", Recorder(), resume=True)] == [1, 2]

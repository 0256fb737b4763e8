"""The effects of the routers' options on a run: rates, balance terms, health figures, kinds of router and norm, the first load."""

import math

import pytest
import torch
from recorder import Recorder
from small_backbone import ROUTED, SMALL_RESNET

from advmoe.errors import UserError
from advmoe.training import start
from advmoe.training.checkpoint import RunFolder
from advmoe.training.loop import train
from advmoe.training.methods import METHODS, Method, Phase, moe
from advmoe.training.start import network
from advmoe.training.steps import single_level


class Rates(Recorder):
    """Records the learning rates of each iteration: those of the routers and of all other parameters."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.routers, self.others = [], []
        step = torch.optim.SGD.step

        def keep(optimizer, closure=None):
            for group in optimizer.param_groups:
                widths = {tuple(p.shape) for p in group["params"]}
                (self.routers if widths <= ROUTER_SHAPES else self.others).append(group["lr"])
            step(optimizer, closure)

        monkeypatch.setattr(torch.optim.SGD, "step", keep)


ROUTER_SHAPES = {(2,), *((2, width) for width in (2, 4, 8, 16))}  # linear layers of per-layer routers at width 4, r = 0.5


@pytest.mark.parametrize("method", ["advmoe", "at_moe"])
def test_router_warmup_rises_linearly_and_decays_with_the_cosine(method, tiny, splits, tmp_path, monkeypatch):
    rates = Rates(monkeypatch)
    config = tiny(method, epochs=2, tied_share=0.0, lr=0.1, router_lr=0.04, router_warmup=0.5)
    train(config, splits, tmp_path / "run", rates)
    # 60 images in batches of 20: 6 iterations; the rise takes the first 3
    cosine = [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    rise = [0, 1 / 3, 2 / 3, 1, 1, 1]
    assert rates.routers == pytest.approx([0.04 * r * c for r, c in zip(rise, cosine, strict=True)])
    assert rates.others == pytest.approx([0.1 * c for c in cosine])


@pytest.mark.parametrize("method", ["advmoe", "at_moe"])
def test_the_schedule_untied_begins_when_routers_learn(method, tiny, splits, tmp_path, monkeypatch):
    rates = Rates(monkeypatch)
    untied = {"tied_share": 0.5, "router_schedule": "untied", "router_warmup": 0.5}
    train(tiny(method, epochs=2, lr=0.1, router_lr=0.04, **untied), splits, tmp_path / "run", rates)
    expected = [0.04 * rise * 0.5 * (1 + math.cos(math.pi * i / 3)) for i, rise in enumerate([0, 2 / 3, 1])]
    assert rates.routers[-3:] == pytest.approx(expected)
    assert rates.others == pytest.approx([0.1 * 0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])


def test_a_warmup_that_ends_before_routers_learn_is_refused(tiny, splits, tmp_path):
    with pytest.raises(UserError, match=r"^router_warmup 0\.4 ends before the routers learn, after 0\.5 of the"):
        train(tiny(tied_share=0.5, router_warmup=0.4), splits, tmp_path / "run")
    waiting = {"router_target": "confusion", "router_loss": "target", "tied_share": 0.0}
    with pytest.raises(UserError, match=r"^router_warmup 0\.4 ends before the routers learn, after 0\.5 of the"):
        train(tiny(epochs=2, router_warmup=0.4, **waiting), splits, tmp_path / "run")


def test_experts_are_tied_in_the_first_phase_only(tiny, splits, tmp_path, monkeypatch):
    """In a later phase they differ at the start, and equal updates would keep the difference."""
    tied = []

    def watched(state, batches):
        tied.append(state.tied)
        return single_level(state, batches)

    monkeypatch.setitem(METHODS, "twice", Method(moe, (Phase(watched, ("weights",)), Phase(watched, ("all",)))))
    train(tiny("twice", epochs=2, tied_share=0.5), splits, tmp_path / "run")
    assert tied == [True] * 3 + [False] * 9


@pytest.mark.parametrize("method", ["advmoe", "at_moe"])
def test_routers_do_not_learn_while_the_experts_are_tied(method, tiny, splits, tmp_path):
    config = tiny(method, epochs=1, tied_share=1.0)
    train(config, splits, tmp_path / "run")
    before, after = network(config, splits.spec), RunFolder(tmp_path / "run").latest().model_state()
    routers = {id(parameter) for parameter in before.router_parameters()}
    assert all(torch.equal(value, after[name]) == (id(value) in routers) for name, value in before.named_parameters())


@pytest.mark.parametrize("method", ["advmoe", "at_moe"])
def test_rows_say_how_far_each_router_has_turned(method, tiny, splits, tmp_path):
    fixed, learned, one_expert = (
        train(tiny(method, epochs=1, tied_share=0.0, **fields), splits, tmp_path / str(number))[0]
        for number, fields in enumerate([{"router_lr": 0.0}, {"router_lr": 1.0}, {"num_experts": 1, "model_scale": 0.5}])
    )
    assert fixed["router_cosine"] == pytest.approx([1.0] * ROUTED)
    (of_stages,) = train(tiny(epochs=1, routers="per_stage", backbone=SMALL_RESNET), splits, tmp_path / "stages")
    assert len(of_stages["router_cosine"]) == 2
    assert len(learned["router_cosine"]) == ROUTED
    assert all(-1 <= cosine < 0.9999 for cosine in learned["router_cosine"])
    assert "router_cosine" not in one_expert


def test_a_network_router_is_not_compared_with_its_start(tiny, splits, tmp_path, monkeypatch):
    monkeypatch.setattr("advmoe.training.loop.network", None)  # a call would raise
    (row,) = train(tiny(epochs=1, routers="per_network"), splits, tmp_path / "run")
    assert "router_cosine" not in row


def test_without_warmup_routers_start_at_their_rate(tiny, splits, tmp_path, monkeypatch):
    rates = Rates(monkeypatch)
    train(tiny(epochs=1, tied_share=0.0, router_lr=0.04), splits, tmp_path / "run", rates)
    assert rates.routers[0] == 0.04


def after_one_iteration(config, splits, run, monkeypatch):
    """The network of a run that is stopped after its first iteration."""
    models = []
    with monkeypatch.context() as patch:
        patch.setattr(start, "network", lambda *args: models.append(network(*args)) or models[-1])
        with pytest.raises(KeyboardInterrupt):
            train(config, splits, run, Recorder(lambda epoch, done: True))
    return models[0]


@pytest.mark.parametrize("term", ["switch", "importance", "entropy"])
def test_balance_changes_only_the_router_update_of_advmoe(term, tiny, splits, tmp_path, monkeypatch):
    """After one iteration with the weights first, the term has changed the routers and not the weights."""
    fields = {"tied_share": 0.0, "level_order": "weights_first"}
    plain, balanced = (
        after_one_iteration(tiny(**options, **fields), splits, tmp_path / str(len(options)), monkeypatch)
        for options in ({}, {"balance": term, "balance_weight": 50.0})
    )
    weights = zip(plain.weight_parameters(), balanced.weight_parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    routers = zip(plain.router_parameters(), balanced.router_parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in routers)


@pytest.mark.parametrize("method", ["advmoe", "at_moe"])
def test_a_heavy_balance_term_evens_the_load(method, tiny, splits, tmp_path):
    def busiest(**balance):
        config = tiny(method, epochs=2, tied_share=0.0, lr=0.0, router_lr=0.05, **balance)
        last = train(config, splits, tmp_path / str(len(balance)), Recorder())[-1]
        return sum(max(layer) for layer in last["load"]) / len(last["load"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "network", lambda *args: lopsided(network(*args), weight=0.3, bias=1.0))
        assert busiest(balance="entropy", balance_weight=100.0) < busiest() - 0.05


def lopsided(model, weight=0.0, bias=0.0):
    """Routers that prefer expert 0 by `bias`, with their weights times `weight`."""
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.router.linear.weight.mul_(weight)
            layer.router.linear.bias.copy_(torch.tensor([bias, 0.0]))
    return model


@pytest.mark.parametrize("method", ["advmoe", "at_moe"])
def test_rows_hold_load_dead_experts_and_entropy_of_each_layer(method, tiny, splits, tmp_path, monkeypatch):
    """Every router is constant and prefers expert 0 at odds of 3 to 1."""
    monkeypatch.setattr(start, "network", lambda *args: lopsided(network(*args), bias=math.log(3)))
    history = train(tiny(method, epochs=1, tied_share=0.0, lr=0.0, router_lr=0.0), splits, tmp_path / "run", Recorder())
    (row,) = history
    assert row["load"] == [[1.0, 0.0]] * ROUTED
    assert row["dead"] == [[1]] * ROUTED
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert row["router_entropy"] == pytest.approx([entropy] * ROUTED, rel=1e-5)


def test_load_is_the_share_of_the_epochs_images(tiny, splits, tmp_path, monkeypatch):
    """Routers have equal logits, so expert 0 is chosen, but the last layer's bias prefers expert 1."""

    def planted(*args):
        model = lopsided(network(*args))
        with torch.no_grad():
            model.moe_layers()[-1].router.linear.bias[1] = 1.0
        return model

    monkeypatch.setattr(start, "network", planted)
    (row,) = train(tiny(epochs=1, tied_share=0.0, lr=0.0, router_lr=0.0), splits, tmp_path / "run", Recorder())
    assert row["load"] == [[1.0, 0.0]] * (ROUTED - 1) + [[0.0, 1.0]]
    assert row["dead"] == [[1]] * (ROUTED - 1) + [[0]]
    assert row["router_entropy"][:-1] == pytest.approx([math.log(2)] * (ROUTED - 1), rel=1e-5)


def test_dense_rows_hold_no_routing(tiny, splits, tmp_path):
    (row,) = train(tiny("at_dense", epochs=1), splits, tmp_path / "run", Recorder())
    assert not {"load", "dead", "router_entropy"} & set(row)


@pytest.mark.parametrize("norms", ["shared", "per_expert"])
@pytest.mark.parametrize("routers", ["per_layer", "per_stage", "per_network"])
@pytest.mark.parametrize("method", ["advmoe", "at_moe"])
def test_every_kind_of_router_and_norm_trains(method, routers, norms, tiny, splits, tmp_path):
    tied = {"tied_share": 0.34, "router_schedule": "untied", "router_warmup": 0.1}
    config = tiny(method, epochs=1, routers=routers, norms=norms, balance="switch", **tied)
    (row,) = train(config, splits, tmp_path / "run", Recorder())
    layers = 1 if routers == "per_network" else ROUTED
    assert len(row["load"]) == len(row["dead"]) == len(row["router_entropy"]) == layers
    assert all(sum(layer) == pytest.approx(1) for layer in row["load"])
    before, after = network(config, splits.spec), RunFolder(tmp_path / "run").latest().model_state()
    assert all(not torch.equal(parameter, after[name]) for name, parameter in before.named_parameters())


@pytest.mark.parametrize(
    ("method", "routers", "norms"),
    [("advmoe", "per_network", "per_expert"), ("advmoe", "per_stage", "per_expert"), ("at_moe", "per_layer", "per_expert")],
)
def test_every_kind_of_router_and_norm_resumes_bit_by_bit(method, routers, norms, tiny, splits, tmp_path):
    config = tiny(method, epochs=1, routers=routers, norms=norms, router_warmup=0.7, save_minutes=0.0)
    train(config, splits, tmp_path / "uninterrupted", Recorder())
    with pytest.raises(KeyboardInterrupt):
        train(config, splits, tmp_path / "resumed", Recorder(lambda epoch, done: done == 2))
    train(config, splits, tmp_path / "resumed", Recorder(), resume=True)
    expected, state = (RunFolder(tmp_path / name).latest().model_state() for name in ("uninterrupted", "resumed"))
    assert all(torch.equal(expected[name], state[name]) for name in expected)


def test_rows_have_the_routers_learning_rate_too(tiny, splits, tmp_path):
    (row,) = train(tiny(epochs=1, tied_share=0.0, lr=0.1, router_lr=0.04), splits, tmp_path / "run", Recorder())
    assert row["router_lr"] == pytest.approx(0.4 * row["lr"], rel=1e-12)


def test_two_levels_share_the_decoding_processes(tiny, splits, tmp_path, monkeypatch):
    workers, augmented = [], type(splits.train).augmented

    def recording(self, rows, seeds, data):
        workers.append(data.workers)
        return augmented(self, rows, seeds, data)

    monkeypatch.setattr(type(splits.train), "augmented", recording)
    train(tiny("advmoe", epochs=1, workers=6), splits, tmp_path / "two", Recorder())
    train(tiny("at_moe", epochs=1, workers=6), splits, tmp_path / "one", Recorder())
    assert workers == [3, 3, 6]

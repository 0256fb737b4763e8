"""The resumable runner: interrupted anywhere, shared out, refused where it belongs to something else."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from toys import Toy, dense, images, labels

from advmoe.attacks.registry import Attack
from advmoe.errors import UserError
from advmoe.evaluation import ATTACKS, evaluate, store

EPSILON = 0.02
PRESET = ("pgd_10", "pgd_50", "straight_through_1", "reroute_quick")
TOY, X = Toy().eval(), images(11)
Y = labels(TOY, X)


@pytest.fixture(scope="module")
def go():
    return partial(evaluate, TOY, X, Y, epsilon=EPSILON, preset=PRESET, shard_size=4)


@pytest.fixture(scope="module")
def whole(go):
    return go()


def figures(evaluation):
    """All but the times."""
    tree = evaluation.to_dict()
    tree["attacks"] = {name: {**run, "seconds": 0} for name, run in tree["attacks"].items()}
    return tree


class Counted:
    """`told` that stops the evaluation after so many attacks on shards."""

    def __init__(self, stop=None):
        self.units, self.stop = [], stop

    def __call__(self, attack, number, shard):
        self.units.append((attack, number))
        if len(self.units) == self.stop:
            raise KeyboardInterrupt


UNITS = len(PRESET) * 3  # 11 images in shards of 4


@pytest.mark.parametrize("stop", range(1, UNITS + 1))
def test_interrupted_anywhere_it_resumes_to_the_same(go, whole, tmp_path, stop):
    first, second = Counted(stop), Counted()
    with pytest.raises(KeyboardInterrupt):
        go(store=tmp_path, progress=first)
    resumed = go(store=tmp_path, progress=second)
    assert figures(resumed) == figures(whole)
    assert len(first.units + second.units) == len(set(first.units + second.units)) == UNITS


def test_interrupted_inside_an_attack_it_loses_that_attack_alone(go, whole, tmp_path):
    seen = []

    def stop(job):
        seen.append(job.shard)
        if job.shard == 1:
            raise KeyboardInterrupt
        return ATTACKS["reroute_quick"].run(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ATTACKS, "straight_through_1", replace(ATTACKS["straight_through_1"], run=stop))
        with pytest.raises(KeyboardInterrupt):
            go(store=tmp_path)
    assert seen == [0, 1]
    again = Counted()
    go(store=tmp_path, progress=again)
    assert ("pgd_50", 1) not in again.units
    assert ("straight_through_1", 1) in again.units


def test_finished_evaluation_runs_nothing_again(go, whole, tmp_path):
    go(store=tmp_path)
    again = Counted()
    assert figures(go(store=tmp_path, progress=again)) == figures(whole)
    assert again.units == []
    assert not [path for path in tmp_path.iterdir() if "draft" in path.name]


def test_every_attack_once(go):
    units = Counted()
    go(progress=units)
    assert sorted(units.units) == sorted((name, number) for name in PRESET for number in range(3))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_parts_collected_are_the_whole(go, whole, tmp_path, order):
    own = {}
    for number in order:
        own[number] = go(store=tmp_path, part=(number, 2))
    assert own[0].rows == [0, 1, 2, 3, 8, 9, 10]
    assert own[1].rows == [4, 5, 6, 7]
    flags = whole.to_dict()["flags"]
    assert own[1].to_dict()["flags"] == flags[4:8]
    assert own[0].to_dict()["flags"] == flags[:4] + flags[8:]
    collecting = Counted()
    assert figures(go(store=tmp_path, progress=collecting)) == figures(whole)
    assert collecting.units == []


def test_more_parts_than_shards(go, whole, tmp_path):
    idle = go(store=tmp_path, part=(4, 5))
    assert (idle.images, idle.checks) == (0, [])
    assert figures(go(store=tmp_path)) == figures(whole)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"epsilon": 0.03}, "another epsilon"),
        ({"seed": 1}, "another seed"),
        ({"shard_size": 5}, r"another shard_size \(4, not 5\)"),
        ({"norm": "L2", "preset": ("pgd_10",)}, r"another norm \(Linf, not L2\)"),
        ({"bf16_search": True}, r"another search \(float32, not bfloat16\)"),
    ],
)
def test_shards_of_other_settings_are_refused(go, tmp_path, other, said):
    go(store=tmp_path, preset=("pgd_10",))
    with pytest.raises(UserError, match=said) as error:
        go(store=tmp_path, **other)
    assert "\n" not in str(error.value)
    assert "move it away or use --fresh" in str(error.value)


def test_shards_of_another_network_or_data_are_refused(tmp_path):
    options = {"epsilon": EPSILON, "preset": ("pgd_10",), "store": tmp_path}
    evaluate(TOY, X, Y, **options)
    with pytest.raises(UserError, match="another network"):
        evaluate(Toy(seed=1).eval(), X, Y, **options)
    with pytest.raises(UserError, match="another data"):
        evaluate(TOY, X.flip(0), Y.flip(0), **options)
    with pytest.raises(UserError, match="another data"):
        evaluate(TOY, X, Y.roll(1), **options)


def test_weights_of_any_type_tell_networks_apart(tmp_path):
    class Cast(torch.nn.Module):
        def __init__(self, fill):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((4, 36), fill, dtype=torch.bfloat16))
            self.register_buffer("steps", torch.tensor(3))

        def forward(self, z):
            return z.flatten(1) @ self.weight.float().T

    y = torch.zeros(11, dtype=torch.long)
    evaluate(Cast(0.5).eval(), X, y, epsilon=EPSILON, preset=("pgd_10",), store=tmp_path)
    with pytest.raises(UserError, match="another network"):
        evaluate(Cast(0.25).eval(), X, y, epsilon=EPSILON, preset=("pgd_10",), store=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("shard-00001.json", '{"rows": [4, 5', "shard-00001.json: is damaged"),
        ("shard-00001.json", "[]", "shard-00001.json: is damaged"),
        ("shard-00001.json", "{}", "shard-00001.json: is damaged"),
        ("key.json", "", "key.json: is damaged"),
    ],
)
def test_damaged_file_is_one_line(go, tmp_path, name, content, said):
    go(store=tmp_path, preset=("pgd_10",))
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said) as error:
        go(store=tmp_path, preset=("pgd_10",))
    assert "remove it to run it anew" in str(error.value)
    (tmp_path / name).unlink()
    go(store=tmp_path, preset=("pgd_10",))


def test_shard_of_other_images_is_refused(go, tmp_path):
    go(store=tmp_path, preset=("pgd_10",))
    (tmp_path / "shard-00000.json").write_text((tmp_path / "shard-00001.json").read_text())
    with pytest.raises(UserError, match=r"shard-00000\.json: not a shard of these images"):
        go(store=tmp_path, preset=("pgd_10",))


@pytest.mark.parametrize("earlier", [("pgd_50", "reroute_quick"), ("straight_through_1",), ("aa_apgd-ce", "pgd_10")])
def test_what_another_plan_left_changes_no_figure(go, tmp_path, earlier):
    """A stored attack counts only if it was run on the images that this plan gives it."""
    plan = ("pgd_10", "pgd_50", "straight_through_1", "aa_apgd-ce", "reroute_quick")
    fresh = go(preset=plan)
    go(store=tmp_path, preset=earlier)
    assert figures(go(store=tmp_path, preset=plan))["broken"] == figures(fresh)["broken"]


def test_attacks_from_another_network_are_run_again(go, tmp_path):
    units = [Counted() for _ in range(3)]
    first, second = dense(), Toy(seed=5).eval()
    for told, transfer in zip(units, (first, first, second), strict=True):
        found = go(store=tmp_path, preset=("transfer",), transfer=transfer, progress=told)
    assert [len(told.units) for told in units] == [3, 0, 3]
    assert figures(found) == figures(go(preset=("transfer",), transfer=second))


def test_started_by_several_at_once(go, tmp_path, monkeypatch):
    """Two processes that both find no key: neither trips over the other's draft."""
    real = store.write_json

    def meanwhile(path, content):
        monkeypatch.setattr(store, "write_json", real)
        with monkeypatch.context() as patch:
            patch.setattr("advmoe.files.os.getpid", lambda: 1)
            go(store=tmp_path, preset=("pgd_10",))
        real(path, content)

    monkeypatch.setattr(store, "write_json", meanwhile)
    go(store=tmp_path, preset=("pgd_10",))


@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", EPSILON), ("L2", 0.1)])
def test_saved_images_are_finite_inside_the_ball_and_fool_as_recorded(tmp_path, norm, epsilon):
    preset = ("pgd_10", "apgd_t", *(("straight_through_1", "reroute_quick") if norm == "Linf" else ()))
    found = evaluate(TOY, X, Y, epsilon=epsilon, norm=norm, preset=preset, shard_size=4, store=tmp_path, save_adversarial=True)
    for name in preset:
        parts = [load_file(path) for path in sorted((tmp_path / "adversarial").glob(f"{name}-0*.safetensors"))]
        rows, x_adv = torch.cat([part["rows"] for part in parts]), torch.cat([part["x_adv"] for part in parts])
        assert len(rows) == found.attacks[name].attacked
        assert torch.isfinite(x_adv).all()
        assert 0 <= x_adv.min() <= x_adv.max() <= 1
        change = (x_adv.double() - X[rows].double()).flatten(1)
        length = change.abs().amax(dim=1) if norm == "Linf" else change.norm(dim=1)
        assert length.max() <= epsilon + 1e-6
        assert rows[TOY(x_adv).argmax(dim=1) != Y[rows]].tolist() == found.broken[name]
    assert found.broken["pgd_10"]


def test_images_requested_later_are_made(go, whole, tmp_path):
    go(store=tmp_path)
    later, again = Counted(), Counted()
    assert figures(go(store=tmp_path, save_adversarial=True, progress=later)) == figures(whole)
    assert len(list((tmp_path / "adversarial").glob("*.safetensors"))) == len(later.units) > 0
    go(store=tmp_path, save_adversarial=True, progress=again)
    assert again.units == []


def test_invalid_image_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(ATTACKS, "pgd_10", Attack(lambda job: job.x * torch.nan))
    evaluate(TOY, X, Y, epsilon=EPSILON, preset=("pgd_10",), store=tmp_path, save_adversarial=True)
    saved = load_file(tmp_path / "adversarial/pgd_10-00000.safetensors")
    assert torch.equal(saved["x_adv"], X[saved["rows"]])


def test_store_is_json(go, tmp_path):
    go(store=tmp_path)
    shard = json.loads((tmp_path / "shard-00000.json").read_text())
    assert set(shard) == {"rows", "correct", "attacks", "routing", "ever", "seal"}
    assert shard["attacks"]["pgd_10"]["rows"] == shard["correct"] == [0, 1, 2]

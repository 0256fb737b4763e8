"""The resumable evaluation: interrupted, divided into parts, and refused in a folder of other settings."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from toy_networks import ToyMoE, dense_network, images, labels

from advmoe.attacks.registry import Attack
from advmoe.errors import UserError
from advmoe.evaluation import ATTACKS, evaluate, store, target

EPSILON = 0.02
PRESET = ("pgd_10", "pgd_50", "straight_through_1", "reroute_quick")
TOY, X = ToyMoE().eval(), images(11)
Y = labels(TOY, X)


@pytest.fixture(scope="module")
def run_evaluation():
    return partial(evaluate, TOY, X, Y, epsilon=EPSILON, preset=PRESET, shard_size=4)


@pytest.fixture(scope="module")
def uninterrupted(run_evaluation):
    return run_evaluation()


def figures(evaluation):
    """The evaluation as a dict, without the times."""
    tree = evaluation.to_dict()
    tree["attacks"] = {name: {**attack, "seconds": 0} for name, attack in tree["attacks"].items()}
    return tree


class CountingProgress:
    """Records each attack on a shard, and stops the evaluation after `stop` of them."""

    def __init__(self, stop=None):
        self.units, self.stop = [], stop

    def __call__(self, attack, number, shard):
        self.units.append((attack, number))
        if len(self.units) == self.stop:
            raise KeyboardInterrupt


UNITS = len(PRESET) * 3  # 11 images in shards of 4


def test_an_evaluation_interrupted_after_every_attack_resumes_to_the_same_result(run_evaluation, uninterrupted, tmp_path):
    units = []
    for _ in range(UNITS):
        progress = CountingProgress(stop=1)
        with pytest.raises(KeyboardInterrupt):
            run_evaluation(store=tmp_path, progress=progress)
        units += progress.units
    assert len(set(units)) == UNITS
    assert figures(run_evaluation(store=tmp_path)) == figures(uninterrupted)


def test_an_evaluation_interrupted_inside_an_attack_loses_only_that_attack(run_evaluation, uninterrupted, tmp_path):
    shards = []

    def stop(job):
        shards.append(job.shard)
        if job.shard == 1:
            raise KeyboardInterrupt
        return ATTACKS["reroute_quick"].run(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ATTACKS, "straight_through_1", replace(ATTACKS["straight_through_1"], run=stop))
        with pytest.raises(KeyboardInterrupt):
            run_evaluation(store=tmp_path)
    assert shards == [0, 1]
    resumed = CountingProgress()
    run_evaluation(store=tmp_path, progress=resumed)
    assert ("pgd_50", 1) not in resumed.units
    assert ("straight_through_1", 1) in resumed.units


def test_finished_evaluation_runs_nothing_again(run_evaluation, uninterrupted, tmp_path):
    run_evaluation(store=tmp_path)
    progress = CountingProgress()
    assert figures(run_evaluation(store=tmp_path, progress=progress)) == figures(uninterrupted)
    assert progress.units == []
    assert not [path for path in tmp_path.iterdir() if "draft" in path.name]


def test_every_attack_runs_once_on_every_shard(run_evaluation):
    progress = CountingProgress()
    run_evaluation(progress=progress)
    assert sorted(progress.units) == sorted((name, number) for name in PRESET for number in range(3))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_parts_together_are_the_full_evaluation(run_evaluation, uninterrupted, tmp_path, order):
    parts = {}
    for number in order:
        parts[number] = run_evaluation(store=tmp_path, part=(number, 2))
    assert parts[0].rows == [0, 1, 2, 3, 8, 9, 10]
    assert parts[1].rows == [4, 5, 6, 7]
    flags = uninterrupted.to_dict()["flags"]
    assert parts[1].to_dict()["flags"] == flags[4:8]
    assert parts[0].to_dict()["flags"] == flags[:4] + flags[8:]
    progress = CountingProgress()
    assert figures(run_evaluation(store=tmp_path, progress=progress)) == figures(uninterrupted)
    assert progress.units == []


def test_a_part_may_have_no_shard(run_evaluation, uninterrupted, tmp_path):
    empty_part = run_evaluation(store=tmp_path, part=(4, 5))
    assert (empty_part.images, empty_part.checks) == (0, [])
    assert figures(run_evaluation(store=tmp_path)) == figures(uninterrupted)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"epsilon": 0.03}, "another epsilon"),
        ({"seed": 1}, "another seed"),
        ({"shard_size": 5}, r"another shard_size \(4, not 5\)"),
        ({"norm": "L2", "preset": ("pgd_10",)}, r"another norm \(Linf, not L2\)"),
        ({"bf16_search": True}, r"another search \(float32, not bfloat16\)"),
    ],
)
def test_shards_of_other_settings_are_refused(run_evaluation, tmp_path, other, message):
    run_evaluation(store=tmp_path, preset=("pgd_10",))
    with pytest.raises(UserError, match=message) as error:
        run_evaluation(store=tmp_path, **other)
    assert "\n" not in str(error.value)
    assert "give this evaluation a --name, or delete those results by --fresh" in str(error.value)


def test_shards_of_another_network_or_data_are_refused(tmp_path):
    options = {"epsilon": EPSILON, "preset": ("pgd_10",), "store": tmp_path}
    other_images = r"holds results on other test images \(another data set or --limit-test\); give this evaluation a --name"
    evaluate(TOY, X, Y, **options)
    with pytest.raises(UserError, match="another network"):
        evaluate(ToyMoE(seed=1).eval(), X, Y, **options)
    with pytest.raises(UserError, match=other_images):
        evaluate(TOY, X.flip(0), Y.flip(0), **options)
    with pytest.raises(UserError, match=other_images):
        evaluate(TOY, X, Y.roll(1), **options)


def test_networks_are_told_apart_by_weights_of_any_dtype(tmp_path):
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


class Linear(torch.nn.Module):
    """A linear network whose attributes change its answers: `levels` of its input, and a relative `error` of its logits."""

    def __init__(self, levels=None, error=0.0, scale=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 36, generator=torch.Generator().manual_seed(0)))
        self.levels, self.error, self.scale = levels, error, scale

    def forward(self, z):
        z = z.flatten(1)
        z = z if self.levels is None else (z * self.levels).round() / self.levels + 0 * z
        return self.scale * (z - 0.5) @ self.weight.T * (1 + self.error)


def test_networks_of_equal_weights_and_predictions_are_told_apart_by_their_answers(tmp_path):
    """The second rounds its input to levels that the images have, so it differs only between them; the third has other logits."""
    x = (X * 8).round() / 8
    y = Linear()(x).argmax(dim=1)
    evaluate(Linear().eval(), x, y, epsilon=EPSILON, preset=("pgd_10",), store=tmp_path)
    for other in (Linear(levels=8), Linear(scale=1.5)):
        assert torch.equal(other(x).argmax(dim=1), y)
        with pytest.raises(UserError, match="a network with other logits or gradients; give this evaluation a --name"):
            evaluate(other.eval(), x, y, epsilon=EPSILON, preset=("pgd_10",), store=tmp_path)
    rounding = Linear(error=1e-4).eval()
    evaluate(rounding, x, y, epsilon=EPSILON, preset=("pgd_10",), store=tmp_path)


def test_rounding_may_send_an_image_to_another_expert(tmp_path):
    def key(answers):
        return store.StoreKey(
            schema=2, network="", data="", predictions="", answers=answers, epsilon=0, norm="Linf", seed=0, search="float32",
            shard_size=4,
        )  # fmt: skip

    answers = [[1.0, -2.0, 3.0]] * 32
    store.Store(tmp_path, key(answers))
    store.Store(tmp_path, key([[0.0, 0.0, 0.0], [5.0, 5.0, 5.0], *answers[2:]]))
    with pytest.raises(UserError, match="other logits or gradients"):
        store.Store(tmp_path, key([[5.0, 5.0, 5.0]] * 3 + answers[3:]))


def test_results_of_another_schema_are_refused(run_evaluation, tmp_path, monkeypatch):
    run_evaluation(store=tmp_path, preset=("pgd_10",))
    monkeypatch.setattr(target, "SCHEMA", target.SCHEMA + 1)
    with pytest.raises(
        UserError, match="results of another version of advmoe, which cannot be continued; give this evaluation a --name"
    ):
        run_evaluation(store=tmp_path, preset=("pgd_10",))


@pytest.mark.parametrize("content", ['{"rows": [4, 5', "[]", "{}"])
def test_a_damaged_shard_is_refused_in_one_line(run_evaluation, tmp_path, content):
    run_evaluation(store=tmp_path, preset=("pgd_10",))
    (tmp_path / "shard-00001.json").write_text(content)
    with pytest.raises(UserError, match=r"shard-00001\.json: is damaged .*; remove it to run it anew"):
        run_evaluation(store=tmp_path, preset=("pgd_10",))
    (tmp_path / "shard-00001.json").unlink()
    run_evaluation(store=tmp_path, preset=("pgd_10",))


def test_results_with_a_damaged_key_or_none_are_refused(run_evaluation, tmp_path):
    """Shards do not say of which network they are."""
    run_evaluation(store=tmp_path, preset=("pgd_10",))
    (tmp_path / "key.json").write_text("")
    with pytest.raises(UserError, match=r"key\.json: is damaged .*; delete the results beside it by --fresh"):
        run_evaluation(store=tmp_path, preset=("pgd_10",))
    (tmp_path / "key.json").unlink()
    with pytest.raises(UserError, match=r"holds results without key\.json, .* delete them by --fresh"):
        run_evaluation(store=tmp_path, preset=("pgd_10",))


def test_the_key_is_removed_last(run_evaluation, tmp_path, monkeypatch):
    """So a removal that is interrupted leaves no results that another network's evaluation would continue."""
    run_evaluation(store=tmp_path, preset=("pgd_10",))
    removed = []
    for call in ("unlink", "rmdir"):
        monkeypatch.setattr(Path, call, lambda path, missing_ok=False: removed.append(path.name))
    store.remove_results(tmp_path)
    assert len(removed) > 2
    assert removed.index("key.json") == len(removed) - 2
    assert removed[-1] == tmp_path.name


def test_results_behind_a_link_are_removed(run_evaluation, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    run_evaluation(store=tmp_path / "link", preset=("pgd_10",))
    store.remove_results(tmp_path / "link")
    assert list((tmp_path / "real").iterdir()) == []


def test_shard_of_other_images_is_refused(run_evaluation, tmp_path):
    run_evaluation(store=tmp_path, preset=("pgd_10",))
    (tmp_path / "shard-00000.json").write_text((tmp_path / "shard-00001.json").read_text())
    with pytest.raises(UserError, match=r"shard-00000\.json: not a shard of these images"):
        run_evaluation(store=tmp_path, preset=("pgd_10",))


def test_results_of_another_plan_change_no_figure(run_evaluation, tmp_path):
    """A stored attack counts only if it ran on all images that it would attack in this plan."""
    plan = ("pgd_10", "pgd_50", "straight_through_1", "aa_apgd-ce", "reroute_quick")
    fresh = run_evaluation(preset=plan)
    for earlier in (("pgd_50", "reroute_quick"), ("straight_through_1",), ("aa_apgd-ce", "pgd_10")):
        folder = tmp_path / earlier[0]
        run_evaluation(store=folder, preset=earlier)
        assert run_evaluation(store=folder, preset=plan).figures.items() >= fresh.figures.items()


def test_the_worst_case_keeps_what_an_earlier_version_of_an_attack_broke(run_evaluation, tmp_path, monkeypatch):
    before = run_evaluation(store=tmp_path, preset=("apgd_ce",))
    assert before.broken["apgd_ce"]
    monkeypatch.setitem(ATTACKS, "apgd_ce", replace(ATTACKS["apgd_ce"], version=99, run=lambda job: job.x))
    after = run_evaluation(store=tmp_path, preset=("apgd_ce",))
    assert after.broken["apgd_ce"] == []
    assert (after.ever, after.worst) == (before.ever, before.worst)


def test_a_plan_of_fewer_images_removes_no_figure(run_evaluation, tmp_path):
    """After APGD on the targeted margin, fewer images are left for APGD than before it."""
    before = run_evaluation(store=tmp_path, preset=("autoattack",))
    progress = CountingProgress()
    after = run_evaluation(store=tmp_path, preset=("apgd_margin_t", "aa_apgd-ce"), progress=progress)
    assert after.figures["ra_aa"] == before.figures["ra_aa"]
    assert after.attacks["aa_apgd-ce"] == before.attacks["aa_apgd-ce"]
    assert {name for name, _ in progress.units} == {"apgd_margin_t"}


def test_a_plan_of_other_images_adds_them_to_the_stored_result(run_evaluation, tmp_path, monkeypatch):
    """An attack that draws noise for a batch could break other images in another run: here a later one breaks none."""
    attacked = []

    def attack(name, run):
        monkeypatch.setitem(ATTACKS, name, replace(ATTACKS[name], run=run))

    def breaks_none(job):
        attacked.extend(job.images)
        return job.x

    for name, other in (("aa_apgd-ce", "pgd_10"), ("aa_apgd-t", "apgd_margin_t"), ("aa_fab-t", "pgd_10"), ("aa_square", "pgd_10")):
        attack(name, ATTACKS[other].run)
    before = run_evaluation(store=tmp_path, preset=("autoattack",))
    attack("aa_apgd-t", breaks_none)
    after = run_evaluation(store=tmp_path, preset=("aa_apgd-t",))
    assert after.figures == before.figures
    assert after.broken["aa_apgd-t"] == before.broken["aa_apgd-t"] != []
    assert attacked == before.broken["aa_apgd-ce"] != []
    assert after.attacks["aa_apgd-t"].attacked == len(after.correct)


@pytest.mark.parametrize("first", [True, False])
def test_images_are_added_to_the_stored_ones(run_evaluation, tmp_path, first):
    """If the first plan did not keep them, they are made again."""

    def saved(folder):
        parts = [load_file(path) for path in sorted((folder / "adversarial").glob("apgd_ce-*"))]
        return {int(row): x for part in parts for row, x in zip(part["rows"], part["x_adv"], strict=True)}

    few = run_evaluation(store=tmp_path / "added", preset=("pgd_50", "apgd_ce"), save_adversarial=first)
    added = run_evaluation(store=tmp_path / "added", preset=("apgd_ce",), save_adversarial=True)
    at_once = run_evaluation(store=tmp_path / "once", preset=("apgd_ce",), save_adversarial=True)
    assert 0 < few.attacks["apgd_ce"].attacked < len(added.correct)
    assert (added.broken["apgd_ce"], sorted(saved(tmp_path / "added"))) == (at_once.broken["apgd_ce"], added.correct)
    for row, x_adv in saved(tmp_path / "once").items():
        torch.testing.assert_close(saved(tmp_path / "added")[row], x_adv)


def test_images_of_a_plan_of_fewer_images_are_those_of_the_stored_result(run_evaluation, tmp_path):
    before = run_evaluation(store=tmp_path, preset=("apgd_ce",))
    after = run_evaluation(store=tmp_path, preset=("pgd_50", "apgd_ce"), save_adversarial=True)
    totals = before.attacks["apgd_ce"]
    assert (after.attacks["apgd_ce"].attacked, after.attacks["apgd_ce"].broken) == (totals.attacked, totals.broken)
    saved = [load_file(path)["rows"] for path in (tmp_path / "adversarial").glob("apgd_ce-*")]
    assert len(torch.cat(saved)) == totals.attacked


def test_transfer_attacks_from_another_network_are_run_again(run_evaluation, tmp_path):
    counts = [CountingProgress() for _ in range(3)]
    first, second = dense_network(), ToyMoE(seed=5).eval()
    for progress, transfer in zip(counts, (first, first, second), strict=True):
        evaluation = run_evaluation(store=tmp_path, preset=("transfer",), transfer=transfer, progress=progress)
    assert [len(progress.units) for progress in counts] == [3, 0, 3]
    assert figures(evaluation) == figures(run_evaluation(preset=("transfer",), transfer=second))
    other = run_evaluation(preset=("transfer",), transfer=first)
    assert len({result.attacks["transfer"].transfer for result in (evaluation, other)} - {None}) == 2


def test_the_pathway_budget_is_in_the_totals_of_the_attack_that_has_one(run_evaluation):
    attacks = run_evaluation(preset=("pgd_10", "paths"), pathway_budget=5).attacks
    assert [attacks[name].pathway_budget for name in ("pgd_10", "paths")] == [None, 5]
    assert "pathway_budget" not in attacks["pgd_10"].model_dump()


def test_two_parts_may_start_at_once(run_evaluation, tmp_path, monkeypatch):
    """Both processes find no key file and write one; neither fails on the other's draft."""
    write_json = store.write_json

    def write_after_another_process(path, content):
        monkeypatch.setattr(store, "write_json", write_json)
        run_evaluation(store=tmp_path, preset=("pgd_10",), part=(1, 2))
        write_json(path, content)

    monkeypatch.setattr(store, "write_json", write_after_another_process)
    run_evaluation(store=tmp_path, preset=("pgd_10",), part=(0, 2))


@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", EPSILON), ("L2", 0.1)])
def test_saved_images_are_finite_inside_the_ball_and_fool_as_recorded(tmp_path, norm, epsilon):
    preset = ("pgd_10", "apgd_t", *(("straight_through_1", "reroute_quick") if norm == "Linf" else ()))
    evaluation = evaluate(TOY, X, Y, epsilon=epsilon, norm=norm, preset=preset, shard_size=4, store=tmp_path, save_adversarial=True)
    for name in preset:
        parts = [load_file(path) for path in sorted((tmp_path / "adversarial").glob(f"{name}-0*.safetensors"))]
        rows, x_adv = torch.cat([part["rows"] for part in parts]), torch.cat([part["x_adv"] for part in parts])
        assert len(rows) == evaluation.attacks[name].attacked
        assert torch.isfinite(x_adv).all()
        assert 0 <= x_adv.min() <= x_adv.max() <= 1
        change = (x_adv.double() - X[rows].double()).flatten(1)
        length = change.abs().amax(dim=1) if norm == "Linf" else change.norm(dim=1)
        assert length.max() <= epsilon + 1e-6
        assert rows[TOY(x_adv).argmax(dim=1) != Y[rows]].tolist() == evaluation.broken[name]
    assert evaluation.broken["pgd_10"]


def test_adversarial_images_can_be_saved_later(run_evaluation, uninterrupted, tmp_path):
    run_evaluation(store=tmp_path)
    with_images, finished = CountingProgress(), CountingProgress()
    assert figures(run_evaluation(store=tmp_path, save_adversarial=True, progress=with_images)) == figures(uninterrupted)
    assert len(list((tmp_path / "adversarial").glob("*.safetensors"))) == len(with_images.units) > 0
    run_evaluation(store=tmp_path, save_adversarial=True, progress=finished)
    assert finished.units == []


def test_saved_images_need_a_store(run_evaluation):
    with pytest.raises(UserError, match="save_adversarial needs a store, the folder to which the images are written"):
        run_evaluation(save_adversarial=True)


def test_saved_images_of_a_replaced_result_are_removed(run_evaluation, tmp_path, monkeypatch):
    """Another plan attacks other images. A process that is stopped before the result is stored leaves no x' of that plan."""

    def saved():
        return {path.name: load_file(path)["rows"].tolist() for path in (tmp_path / "adversarial").glob("apgd_ce-*")}

    few, all_images = ("pgd_50", "apgd_ce"), ("apgd_ce",)
    run_evaluation(store=tmp_path, preset=few, save_adversarial=True)
    first = saved()
    assert first
    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_evaluation(store=tmp_path, preset=all_images, save_adversarial=True)
    assert "apgd_ce-00000.safetensors" not in saved()
    run_evaluation(store=tmp_path, preset=all_images)
    assert saved() == {}
    run_evaluation(store=tmp_path, preset=all_images, save_adversarial=True)
    assert len(saved()) == 3
    assert saved() != first


def test_invalid_image_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(ATTACKS, "pgd_10", Attack(lambda job: job.x * torch.nan))
    evaluate(TOY, X, Y, epsilon=EPSILON, preset=("pgd_10",), store=tmp_path, save_adversarial=True)
    saved = load_file(tmp_path / "adversarial/pgd_10-00000.safetensors")
    assert torch.equal(saved["x_adv"], X[saved["rows"]])


def test_store_is_json(run_evaluation, tmp_path):
    run_evaluation(store=tmp_path)
    shard = json.loads((tmp_path / "shard-00000.json").read_text())
    assert set(shard) == {"rows", "correct", "attacks", "routing", "ever", "seal"}
    assert shard["attacks"]["pgd_10"]["rows"] == shard["correct"] == [0, 1, 2]


def test_results_that_cannot_be_removed_are_an_error(run_evaluation, tmp_path, monkeypatch):
    run_evaluation(store=tmp_path / "folder", preset=("pgd_10",))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", Mock(side_effect=PermissionError))
        with pytest.raises(PermissionError):
            store.remove_results(tmp_path / "folder")
    store.remove_results(tmp_path / "folder")
    store.remove_results(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()

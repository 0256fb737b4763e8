"""`evaluate` from Python: figures, the order of attacks, seeds, and errors."""

import warnings
from dataclasses import replace

import pytest
import torch
from image_specs import image_spec
from torch import nn
from toy_networks import CLASSES, ToyMoE, dense_network, images, labels

from advmoe.attacks import Apgd, ImageDraws, Pgd, apgd, derive_seed, pgd
from advmoe.attacks.autoattack import STANDARD as AUTOATTACK
from advmoe.attacks.presets import Preset
from advmoe.attacks.registry import Attack
from advmoe.attacks.surrogate import Search, surrogate_pgd, through_gate
from advmoe.errors import UserError
from advmoe.evaluation import ATTACKS, evaluate
from advmoe.evaluation.results import wilson
from advmoe.models.resnet import ResNet
from advmoe.moe import HARD, ForcedGate, Gate, MoEKind, Routing, StraightThroughGate

EPSILON = 0.02
QUICK = ("pgd_10", "pgd_50", "reroute_quick")


@pytest.fixture(scope="module")
def toy():
    return ToyMoE().eval()


@pytest.fixture(scope="module")
def x():
    return images(20)


@pytest.fixture(scope="module")
def y(toy, x):
    return labels(toy, x)


@pytest.fixture(scope="module")
def evaluated(toy, x, y):
    return evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_10", "pgd_50", "straight_through_1", "reroute"), shard_size=7)


def rows_where(flags):
    return flags.nonzero()[:, 0].tolist()


def test_pgd_figures_are_pgd_on_every_correct_image(toy, x, y, evaluated):
    """By hand: each figure alone, over the images that are classified correctly."""
    correct = toy(x).argmax(dim=1) == y
    for steps in (10, 50):
        x_adv = pgd(toy, x, y, Pgd(EPSILON, EPSILON / 4, steps), ImageDraws(derive_seed(0, 0), range(len(x))))
        broken = correct & (toy(x_adv).argmax(dim=1) != y)
        assert evaluated.broken[f"pgd_{steps}"] == rows_where(broken)
        assert evaluated.figures[f"ra_{steps}"] == pytest.approx(100 * (correct & ~broken).float().mean().item())
        assert evaluated.attacks[f"pgd_{steps}"].attacked == int(correct.sum()) == len(x) - 1
    assert evaluated.sa == pytest.approx(95.0)
    assert 0 < len(evaluated.broken["pgd_50"]) < 19


def test_attacks_on_survivors_run_one_after_another_on_what_is_still_robust(toy, x, y, evaluated):
    survivors = set(evaluated.correct) - set(evaluated.broken["pgd_10"]) - set(evaluated.broken["pgd_50"])
    assert evaluated.attacks["straight_through_1"].attacked == len(survivors)
    rows = sorted(survivors)
    x_adv = surrogate_pgd(
        toy, through_gate(toy, StraightThroughGate()), x[rows], y[rows], Search(EPSILON, 50),
        ImageDraws(derive_seed(0, 5, 1), rows),
    )  # fmt: skip
    fooled = toy(x_adv).argmax(dim=1) != y[rows]
    assert evaluated.broken["straight_through_1"] == [rows[n] for n in rows_where(fooled)]
    assert evaluated.attacks["reroute"].attacked == len(survivors) - len(evaluated.broken["straight_through_1"])


def test_worst_is_the_union_of_all_attacks_and_flags_are_the_robust_images(x, evaluated):
    broken = {row for rows in evaluated.broken.values() for row in rows}
    assert evaluated.worst == pytest.approx(100 * (len(evaluated.correct) - len(broken)) / len(x))
    assert evaluated.worst <= min(evaluated.figures.values()) <= evaluated.sa
    flags = evaluated.to_dict()["flags"]
    assert flags == "".join("1" if row in set(evaluated.correct) - broken else "0" for row in range(len(x)))
    assert flags[3] == "0"
    assert flags.count("1") == round(evaluated.worst * len(x) / 100)
    assert next(iter(evaluated.to_dict()["figures"])) == "ra_worst_quick"


@pytest.mark.usefixtures("short_autoattack")
def test_with_autoattack_only_its_survivors_are_attacked_further(toy, x, y):
    evaluation = evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_10", "autoattack", "reroute"), shard_size=20)
    aa_broken = {row for name in AUTOATTACK for row in evaluation.broken[name]}
    assert evaluation.figures["ra_aa"] == pytest.approx(100 * (19 - len(aa_broken)) / 20)
    assert evaluation.attacks["aa_apgd-ce"].attacked == evaluation.attacks["pgd_10"].attacked == 19
    assert evaluation.attacks["reroute"].attacked == 19 - len(aa_broken)
    assert evaluation.complete
    assert next(iter(evaluation.to_dict()["figures"])) == "ra_worst"


def test_complete_needs_all_of_autoattack_and_for_routed_networks_a_route_aware_attack(toy, x, y, monkeypatch):
    for name in AUTOATTACK:
        monkeypatch.setitem(ATTACKS, name, replace(ATTACKS[name], run=lambda job: job.x))
    plain = dense_network()

    def complete(model, *preset):
        return evaluate(model, x, labels(model, x), epsilon=EPSILON, preset=preset).complete

    assert complete(plain, "autoattack")
    assert not complete(plain, "pgd_10")
    assert not complete(plain, *AUTOATTACK[:3])
    assert not complete(toy, "autoattack")
    assert not complete(toy, "autoattack", "straight_through_1")
    assert not complete(toy, "aa_square", "reroute_quick")
    assert not complete(toy, "autoattack", "reroute_quick")
    assert complete(toy, "autoattack", "reroute")


def test_a_weaker_plan_keeps_the_stored_results(toy, x, y, tmp_path, monkeypatch):
    for name in AUTOATTACK:
        monkeypatch.setitem(ATTACKS, name, replace(ATTACKS[name], run=lambda job: job.x))
    options = {"epsilon": EPSILON, "store": tmp_path}
    full = evaluate(toy, x, y, preset=("pgd_10", "pgd_50", "autoattack", "reroute", "paths"), **options)
    later = evaluate(toy, x, y, preset=("pgd_10",), **options)
    assert (later.worst, later.complete, later.to_dict()["flags"]) == (full.worst, True, full.to_dict()["flags"])
    assert later.figures == full.figures
    assert {"ra_aa", "ra_paths"} <= full.figures.keys()
    assert (later.checks, later.routing) == (full.checks, full.routing)
    assert {check.number: check.status for check in later.checks}[5] == "fail"
    for name in ("aa_fab-t", "reroute"):
        with monkeypatch.context() as newer:
            newer.setitem(ATTACKS, name, replace(ATTACKS[name], version=99))
            assert not evaluate(toy, x, y, preset=("pgd_10",), **options).complete
    assert evaluate(toy, x, y, preset=("pgd_10",), **options).complete


def test_an_attack_that_ran_on_other_survivors_gives_no_figure(toy, x, y, tmp_path, monkeypatch):
    """Each attack of AutoAttack alone, after reroute: images that reroute broke were not attacked."""
    for name in AUTOATTACK:
        monkeypatch.setitem(ATTACKS, name, replace(ATTACKS[name], run=lambda job: job.x))
    evaluation = evaluate(toy, x, y, epsilon=EPSILON, preset=("reroute", *AUTOATTACK), store=tmp_path)
    assert evaluation.figures == {}
    evaluate(toy, x, y, epsilon=EPSILON, preset=("autoattack",), store=tmp_path)
    assert list(evaluate(toy, x, y, epsilon=EPSILON, preset=("reroute",), store=str(tmp_path)).figures) == ["ra_aa"]
    monkeypatch.setitem(ATTACKS, "aa_fab-t", replace(ATTACKS["aa_fab-t"], version=99))
    assert evaluate(toy, x, y, epsilon=EPSILON, preset=("reroute",), store=tmp_path).figures == {}


def test_attacks_of_earlier_plans_are_listed_because_they_count(toy, x, y, tmp_path):
    evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_50",), store=tmp_path, shard_size=7)
    evaluate(toy, x, y, epsilon=EPSILON, preset=("reroute",), store=tmp_path, shard_size=7)
    later = evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_10",), store=tmp_path, shard_size=7)
    assert later.worst < later.figures["ra_10"] == evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_10",)).worst
    assert list(later.figures) == ["ra_10", "ra_50"]
    assert list(later.attacks) == list(later.broken) == ["pgd_10", "pgd_50", "reroute"]
    assert later.partly_run == {}
    assert set(later.ever) == {row for rows in later.broken.values() for row in rows}


def test_an_attack_that_was_stopped_is_no_attack_of_the_evaluation_though_its_breaks_count(toy, x, y, tmp_path):
    """The presets' names in reports depend on the listed attacks, so a quick evaluation that was stopped must not look complete."""
    options = {"epsilon": EPSILON, "store": tmp_path, "shard_size": 7}
    first = evaluate(toy, x, y, preset="quick", part=(0, 3), **options)
    later = evaluate(toy, x, y, preset=("pgd_10",), **options)
    assert (list(later.attacks), list(later.broken), list(later.figures)) == (["pgd_10"], ["pgd_10"], ["ra_10"])
    assert (later.left_out, later.routing) == ({}, None)
    assert later.result().partly_run == dict.fromkeys(list(first.attacks)[1:], "1 of 3 shards")
    assert set(first.ever) - set(later.broken["pgd_10"])
    assert set(later.ever) == set(first.ever).union(later.broken["pgd_10"])
    assert later.worst == 100 * later.result().flags.count("1") / len(x) < later.figures["ra_10"]
    complete = evaluate(toy, x, y, preset="quick", **options)
    assert (list(complete.attacks), complete.partly_run) == (list(first.attacks), {})
    assert complete.routing is not None


def test_pathways_of_an_earlier_plan_are_listed_but_give_no_figure(toy, x, y, tmp_path):
    first = evaluate(toy, x, y, epsilon=EPSILON, preset=("paths",), store=tmp_path)
    later = evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_10", "paths"), store=tmp_path, pathway_budget=0)
    assert (list(first.figures), list(later.figures)) == (["ra_paths"], ["ra_10"])
    assert (list(later.attacks), later.left_out) == (["pgd_10", "paths"], {})


def test_an_attack_of_a_figure_that_is_also_listed_alone_does_not_raise_the_figure(toy, x, y, monkeypatch):
    """Run again on the survivors, it would break none of them and replace the result of the first run."""
    for name in AUTOATTACK:
        monkeypatch.setitem(ATTACKS, name, replace(ATTACKS[name], run=lambda job: job.x))
    monkeypatch.setitem(ATTACKS, "aa_square", replace(ATTACKS["aa_square"], run=ATTACKS["pgd_50"].run))
    once, twice = (evaluate(toy, x, y, epsilon=EPSILON, preset=preset) for preset in (("autoattack",), ("autoattack", "aa_square")))
    assert twice.figures == once.figures
    assert once.figures["ra_aa"] == once.worst < once.sa


def test_same_seed_same_flags_and_another_seed_other_draws(toy, x, y):
    draws = []

    def watch(job):
        draws.append(job.draws(0).uniform(job.x))
        return job.x

    entry = {"pgd_10": Attack(watch)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ATTACKS, "pgd_10", entry["pgd_10"])
        for seed in (0, 0, 1):
            evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_10",), seed=seed, shard_size=20)
    assert torch.equal(draws[0], draws[1])
    assert not torch.isclose(draws[0], draws[2]).any()
    first, second = (evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_10", "apgd_ce"), shard_size=7) for _ in range(2))
    assert first.broken == second.broken


@pytest.mark.parametrize("size", [1, 3, 20, 64])
def test_shard_size_changes_no_pgd_flag(toy, x, y, evaluated, size):
    evaluation = evaluate(toy, x, y, epsilon=EPSILON, preset=QUICK[:2], shard_size=size)
    assert {name: evaluation.broken[name] for name in ("pgd_10", "pgd_50")} == {
        name: evaluated.broken[name] for name in ("pgd_10", "pgd_50")
    }
    assert evaluation.routing == evaluated.routing


def test_wilson_interval_by_hand():
    """8 of 10 at z = 1.96: 49.02 to 94.33 (Wilson 1927; Newcombe 1998 prints such values); the ends at 0 and n."""
    assert wilson(0.8, 10) == pytest.approx((49.0162, 94.3318), abs=1e-3)
    assert wilson(0.5, 100) == pytest.approx((40.3832, 59.6168), abs=1e-3)
    assert wilson(0.0, 20) == pytest.approx((0.0, 16.1125), abs=1e-3)
    assert wilson(1.0, 20) == pytest.approx((83.8875, 100.0), abs=1e-3)


def test_printing_a_result_shows_the_figures_and_not_the_rows_of_all_images(evaluated):
    assert f"sa={evaluated.sa}, figures={{'ra_10': " in repr(evaluated)
    assert not any(part in repr(evaluated) for part in ("rows=[", "correct=[", "broken={", "ever=["))


def test_intervals_are_of_all_images(evaluated):
    intervals = evaluated.to_dict()["intervals"]
    fixed = {f"fixed_expert_{kind}_{expert}" for kind in ("sa", "ra", "ra_worst") for expert in range(3)}
    assert set(intervals) == {"sa", "ra_10", "ra_50", "ra_worst_quick", "ra_router", "ra_expert", *fixed}
    assert intervals["sa"] == pytest.approx(wilson(0.95, 20))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (x * 2, y), r"pixels must be in \[0, 1\], not \[0\.\d+, 1\.\d+\]"),
        (lambda x, y: (x - 0.5, y), r"pixels must be in \[0, 1\]"),
        (lambda x, y: (x.where(x > x.min(), torch.nan), y), r"pixels must be in \[0, 1\], not \[nan, nan\]"),
        (lambda x, y: (x, y + 1), "labels must be 0 to 3 for 4 logits, not 1 to 4"),
        (lambda x, y: (x, y - 1), "labels must be 0 to 3 for 4 logits, not -1 to 2"),
        (lambda x, y: (x, y[:-1]), "20 images and 19 labels"),
        (lambda x, y: (x[:0], y[:0]), "0 images and 0 labels"),
        (lambda x, y: (x.flatten(1), y), r"images must be \[n, C, H, W\] and labels \[n\], not \[20, 36\]"),
        (lambda x, y: (x.double(), y), "images must be float32 and labels int64, not torch.float64"),
        (lambda x, y: ((255 * x).to(torch.uint8), y), "images must be float32 and labels int64, not torch.uint8"),
        (lambda x, y: (x.numpy(), y.numpy()), "images and labels must be tensors, not ndarray and ndarray"),
        (lambda x, y: (x, y.tolist()), "images and labels must be tensors, not Tensor and list"),
        (lambda x, y: (x, y.float()), "not torch.float32 and torch.float32"),
    ],
)
def test_bad_images_are_refused_in_one_line(toy, x, spoil, message):
    x, y = spoil(x, torch.arange(20) % CLASSES)
    with pytest.raises(UserError, match=message) as error:
        evaluate(toy, x, y, epsilon=EPSILON, preset=("pgd_10",))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "standart"}, "unknown preset or attack 'standart': did you mean standard"),
        ({"preset": ("rerout",)}, "unknown attack 'rerout': did you mean reroute"),
        ({"preset": ("pgd_51",)}, "unknown attack 'pgd_51': did you mean pgd_50"),
        ({"preset": ()}, "no attack is named"),
        ({"preset": ("transfer",)}, "nothing can be run of transfer: no network to transfer from was given"),
        (
            {"preset": ("transfer",), "transfer": dense_network(3)},
            "the network to transfer from gives 3 logits for an image, and the attacked network 4: both need the same classes",
        ),
        (
            {"preset": ("transfer",), "transfer": nn.Sequential(nn.Flatten(), nn.Linear(49, 4))},
            "the network to transfer from does not take images of 1 x 6 x 6",
        ),
        ({"transfer": lambda z: z}, "the network to transfer from must be a Module, not a function"),
        ({"norm": "L1"}, "norm must be Linf or L2, not L1"),
        ({"norm": "L2", "preset": ("reroute",)}, "nothing can be run of reroute: works only in Linf"),
        ({"epsilon": -0.1}, "epsilon must be at least 0 and finite, not -0.1"),
        ({"epsilon": 8.0}, "epsilon must be at most 1 in Linf, not 8: pixels are in"),
        ({"epsilon": float("nan")}, "epsilon must be at least 0 and finite, not nan"),
        ({"seed": -1}, "seed must be in"),
        ({"shard_size": 0}, "shard_size must be at least 1, not 0"),
        ({"shard_size": 2.5}, "shard_size must be a whole number, not 2.5"),
        ({"epsilon": "8/255"}, "epsilon must be a number, not '8/255'"),
        ({"part": (2, 2)}, r"part must be \(i, k\) with 0 <= i < k, not \(2, 2\)"),
    ],
)
def test_bad_options_are_refused_in_one_line(toy, x, y, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(toy, x, y, **{"epsilon": EPSILON, "preset": ("pgd_10",), **options})


class OneGate(Gate):
    """Gives every layer what `gate` gives layer 0."""

    def __init__(self, gate):
        self.gate = gate

    def weights(self, logits, layer):
        return self.gate.weights(logits, 0)


routed = ToyMoE.forward_routed


@pytest.mark.parametrize(
    ("forward_routed", "message"),
    [
        (
            lambda model, z, gate=HARD: routed(model, z, ForcedGate(torch.zeros(len(z), 2, dtype=torch.long))),
            r"routing 0 is not the one that the gate gives MoE layer 0: forward_routed must call gate.weights\(logits, layer\)",
        ),
        (lambda model, z, gate=HARD: routed(model, z, ForcedGate(torch.ones(len(z), 2, dtype=torch.long))), "routing 0 is not"),
        (lambda model, z, gate=HARD: routed(model, z, OneGate(gate)), "routing 1 is not the one that the gate gives MoE layer 1"),
        (lambda model, z, gate=HARD: routed(model, 1 - z, gate), "forward and forward_routed give different logits"),
        (lambda model, z: ToyMoE()(z), r"forward_routed must accept \(x, gate\): too many positional arguments"),
    ],
)
def test_a_network_whose_routing_would_be_missed_is_refused(forward_routed, message, x, y):
    class Faulty(ToyMoE):
        def forward(self, z):
            return routed(self, z)[0]

    Faulty.forward_routed = forward_routed
    with pytest.raises(UserError, match=f"^the network: {message}"):
        evaluate(Faulty().eval(), x, y, epsilon=EPSILON, preset=("pgd_10",))


def test_nan_names_the_image(x, y):
    class Broken(ToyMoE):
        def forward_routed(self, x, gate=HARD):
            logits, routings = super().forward_routed(x, gate)
            return logits.where((x.mean(dim=(1, 2, 3)) != mean)[:, None], torch.nan), routings

    mean = x[13].mean()
    with pytest.raises(UserError, match="returns NaN or infinity for image 13"):
        evaluate(Broken().eval(), x, y, epsilon=EPSILON, preset=("pgd_10",))


@pytest.mark.parametrize(
    ("model", "message"),
    [(nn.Flatten(0).eval(), r"must give logits \[n, classes\]"), (lambda z: z, "the network must be a Module, not a function")],
)
def test_what_returns_no_logits_or_is_no_network_is_refused(model, message, x, y):
    with pytest.raises(UserError, match=message):
        evaluate(model, x, y, epsilon=EPSILON, preset=("pgd_10",))


def test_a_network_that_computes_in_float64_is_attacked_by_every_attack(toy, x, y):
    class Double(ToyMoE):
        def forward_routed(self, z, gate=HARD):
            return super().forward_routed(z.double(), gate)

    plan = ("pgd_10", "apgd_margin_t", "gama", "straight_through_1", "reroute_quick", "paths")
    doubled = evaluate(Double().double().eval(), x, y, epsilon=EPSILON, preset=plan)
    assert doubled.worst == pytest.approx(evaluate(toy, x, y, epsilon=EPSILON, preset=plan).worst, abs=100 / 20)


def test_a_network_of_one_class_is_refused_in_one_line(x):
    with pytest.raises(UserError, match="the network gives 1 logit for an image: it needs one for each of 2 classes or more"):
        evaluate(dense_network(1), x, torch.zeros(20, dtype=torch.long), epsilon=EPSILON, preset=("pgd_10",))


def test_nan_under_attack_counts_as_broken(x):
    class Fragile(nn.Module):
        """Correct on the images themselves, NaN everywhere else: the argmax of NaN is 0, the label."""

        def forward(self, z):
            known = (z.flatten(1)[:, None] == x.flatten(1)[None]).all(dim=2).any(dim=1)
            logits = torch.tensor([1.0, 0.0]).expand(len(z), 2) + 0 * z.sum()
            return logits.where(known[:, None], torch.nan)

    evaluation = evaluate(Fragile().eval(), x, torch.zeros(20, dtype=torch.long), epsilon=EPSILON, preset=("pgd_10",))
    assert evaluation.sa == 100
    assert evaluation.worst == 0


def test_train_mode_gives_a_warning_and_is_restored_even_after_an_exception(x, caplog):
    model = dense_network()
    y = labels(model, x)
    reference = evaluate(model, x, y, epsilon=EPSILON, preset=("pgd_10",))
    model.train()
    model[2].eval()
    model[1].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def stop(*_):
        raise KeyboardInterrupt

    with caplog.at_level("WARNING", "advmoe"):
        evaluation = evaluate(model, x, y, epsilon=EPSILON, preset=("pgd_10",))
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, x, y, epsilon=EPSILON, preset=("pgd_10",), progress=stop)
    assert "the model is in train mode" in caplog.text
    assert evaluation.broken == reference.broken
    assert [module.training for module in model] == [True, True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_network_to_transfer_from_is_in_eval_mode_and_restored(toy, x, y):
    other = dense_network()
    options = {"epsilon": EPSILON, "preset": ("transfer",)}
    reference = evaluate(toy, x, y, transfer=other, **options)
    other.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation = evaluate(toy, x, y, transfer=other, **options)
    assert other.training
    assert evaluation.broken == reference.broken
    assert other[2].num_batches_tracked == 0


@pytest.mark.parametrize("kind", ["outside", "nan", "beyond"])
def test_a_cheating_attack_is_reported_and_not_counted(toy, x, y, monkeypatch, kind):
    def cheat(job):
        if kind == "nan":
            return torch.full_like(job.x, torch.nan)
        return 1 - job.x if kind == "outside" else job.x - 0.01

    x_with_zero = x.clone()
    x_with_zero[:, :, 0, 0] = 0
    monkeypatch.setitem(ATTACKS, "pgd_10", Attack(cheat))
    evaluation = evaluate(toy, x_with_zero, labels(toy, x_with_zero), epsilon=EPSILON, preset=("pgd_10",))
    assert evaluation.broken["pgd_10"] == []
    assert evaluation.worst == evaluation.sa
    (check,) = [check for check in evaluation.checks if check.number == 11]
    assert (check.status, check.detail) == ("fail", "pgd_10: 19 outside")


def test_a_plain_module_is_evaluated_without_the_route_aware_attacks(x):
    model = dense_network()
    evaluation = evaluate(model, x, labels(model, x), epsilon=EPSILON, preset="quick")
    assert evaluation.routing is None
    assert set(evaluation.attacks) == {"pgd_10", "pgd_20", "pgd_50", "apgd_margin_t", "apgd_scaled"}
    assert evaluation.left_out == dict.fromkeys(("straight_through_margin", "reroute_quick"), "the network does not route")


def test_a_network_of_this_package_is_attacked_through_its_routing():
    torch.manual_seed(0)
    model = ResNet(MoEKind(0.5), image_spec(4, [0.5], [0.5]), blocks=(1,), width=4, stem="cifar").eval()
    x = torch.rand(4, 1, 8, 8)
    evaluation = evaluate(model, x, model(x).argmax(dim=1), epsilon=0.1, preset=QUICK)
    assert evaluation.left_out == {}
    assert evaluation.sa == 100
    assert len(evaluation.routing.load) == 2


@pytest.mark.usefixtures("short_autoattack")
def test_l2_runs_pgd_apgd_and_autoattack_and_names_the_attacks_it_leaves_out(toy, x, y):
    preset = ("pgd_10", "autoattack", "apgd_ce", "straight_through_1", "reroute_quick")
    evaluation = evaluate(toy, x, y, epsilon=0.1, norm="L2", preset=preset, shard_size=20)
    assert evaluation.left_out == dict.fromkeys(("straight_through_1", "reroute_quick"), "works only in Linf")
    assert set(evaluation.attacks) == {"pgd_10", "apgd_ce", *AUTOATTACK}
    assert not evaluation.complete
    assert next(check.status for check in evaluation.checks if check.number == 11) == "pass"
    correct = rows_where(toy(x).argmax(dim=1) == y)
    x_adv = pgd(toy, x[correct], y[correct], Pgd(0.1, 0.025, 10, norm="L2"), ImageDraws(derive_seed(0, 0), correct))
    assert evaluation.broken["pgd_10"] == [
        row for row, wrong in zip(correct, toy(x_adv).argmax(1) != y[correct], strict=True) if wrong
    ]
    assert 0 < evaluation.figures["ra_aa"] <= evaluation.figures["ra_10"] < 95


def test_rounding_does_not_put_large_images_outside_the_l2_ball():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 3)).eval(), 0.4 + 0.2 * torch.rand(4, 3, 224, 224)
    evaluation = evaluate(model, x, model(x).argmax(dim=1), epsilon=3.0, norm="L2", preset=("pgd_10",))
    assert next(check.detail for check in evaluation.checks if check.number == 11) == "all inside"
    assert evaluation.worst == 0


@pytest.mark.usefixtures("short_autoattack")
@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_replace_the_attack_whose_loss_needs_more(x, classes):
    model = dense_network(classes)
    y = model(x).argmax(dim=1)
    evaluation = evaluate(model, x, y, epsilon=EPSILON, preset=("autoattack", "apgd_t"), shard_size=20)
    assert evaluation.left_out == {"aa_apgd-t": "needs 4 classes; apgd_t was run instead"}
    assert list(evaluation.attacks) == ["aa_apgd-ce", "apgd_t", "aa_fab-t", "aa_square"]
    assert evaluation.figures == {"ra_aa_few_classes": evaluation.worst}  # not ra_aa: this is not standard AutoAttack
    assert evaluation.complete
    assert not evaluate(model, x, y, epsilon=EPSILON, preset=("aa_apgd-ce", "aa_fab-t", "aa_square")).complete
    plus = evaluate(model, x, y, epsilon=EPSILON, preset=("autoattack_plus",))
    assert plus.figures == {"ra_aa_plus_few_classes": plus.worst}
    assert set(plus.left_out) == ({"aaplus_apgd-dlr", "aaplus_apgd-t"} if classes == 2 else {"aaplus_apgd-t"})
    assert plus.left_out["aaplus_apgd-t"] == "needs 4 classes; apgd_t_plus was run instead"


def test_bf16_success_is_checked_again_in_float32(x, monkeypatch):
    """A network that is fooled only in bf16: rounding makes its two weights equal."""

    class Rounding(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[1.0], [1.001]]))

        def forward(self, z):
            return nn.functional.linear(1 + 0 * z.flatten(1)[:, :1], self.weight)

    model, predictions = Rounding().eval(), []
    y = torch.ones(20, dtype=torch.long)

    def watch(job):
        logits = job.predict(job.x.clone().requires_grad_(True))
        logits.sum().backward()  # attacks of users may need a gradient
        predictions.append(logits.argmax(dim=1))
        return job.x

    monkeypatch.setitem(ATTACKS, "pgd_10", Attack(watch))
    evaluation = evaluate(model, x, y, epsilon=EPSILON, preset=("pgd_10",), bf16_search=True)
    assert torch.equal(predictions[0], torch.zeros_like(y))
    assert len(predictions) == 2
    assert torch.equal(predictions[1], y)
    assert evaluation.sa == evaluation.worst == 100


def test_images_that_a_fixed_pathway_misclassifies_only_in_bf16_are_attacked_again():
    class Rounding(nn.Module):
        """Images take expert 0, which is always right. In bf16, expert 1 is wrong without a gradient: 1.001 and 1.0005 become 1."""

        def forward(self, z):
            return self.forward_routed(z)[0]

        def forward_routed(self, z, gate=HARD):
            change = z.mean(dim=(1, 2, 3)) - 0.5
            inputs = torch.stack([torch.ones_like(change), change], dim=1)

            def linear(*weights):
                return nn.functional.linear(inputs, torch.tensor(weights))

            router = linear((1.0, 0.0), (0.0, 0.0)).float()
            second = linear((1.001, 0.0)) - (linear((1.0005, 1.0)) - linear((1.0, 0.0))).relu()
            experts = gate.weights(router, 0).experts
            first_expert, second_expert = linear((0.0, 0.0), (5.0, 0.0)), torch.cat([linear((1.0, 0.0)), second], dim=1)
            return torch.where(experts[:, None] == 0, first_expert, second_expert), [Routing(router, experts)]

    x, y = torch.full((4, 1, 6, 6), 0.5), torch.ones(4, dtype=torch.long)
    for bf16_search in (False, True):
        evaluation = evaluate(Rounding().eval(), x, y, epsilon=EPSILON, preset=("paths",), bf16_search=bf16_search)
        assert (evaluation.worst, evaluation.figures["ra_paths"]) == (100, 0)


def test_bf16_search_breaks_almost_the_same_images_as_float32(toy, x, y, evaluated):
    evaluation = evaluate(toy, x, y, epsilon=EPSILON, preset=QUICK[:2], bf16_search=True)
    assert len(set(evaluation.broken["pgd_50"]) ^ set(evaluated.broken["pgd_50"])) <= 2
    assert evaluation.broken["pgd_50"]


def test_the_attack_apgd_ce_is_the_function_apgd(toy, x, y):
    evaluation = evaluate(toy, x, y, epsilon=EPSILON, preset=("apgd_ce",))
    rows = evaluation.correct
    x_adv = apgd(toy, x[rows], y[rows], Apgd(EPSILON), ImageDraws(derive_seed(0, 1), rows))
    assert evaluation.broken["apgd_ce"] == [row for row, wrong in zip(rows, toy(x_adv).argmax(1) != y[rows], strict=True) if wrong]


def test_a_presets_attacks_are_listed_once():
    assert Preset({"ra_10": ("pgd_10",)}, ("reroute", "pgd_10")).attacks == ["pgd_10", "reroute"]


def test_a_network_without_a_gradient_is_refused():
    class Detached(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3].detach()

    with pytest.raises(UserError, match="no gradient with respect to the pixels"):
        evaluate(Detached().eval(), torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), epsilon=0.1, preset=["pgd_10"])

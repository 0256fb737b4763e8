"""Presets, plans made from attack names, and their costs in words."""

import sys
from pathlib import Path

import pytest
from budget import budget

from advmoe.attacks import autoattack
from advmoe.attacks.job import Setting
from advmoe.attacks.presets import PRESETS, Preset, plan, resolve
from advmoe.attacks.registry import ATTACKS
from advmoe.errors import UserError


def test_budget_is_the_sum_of_the_attacks_by_kind():
    preset = Preset({"ra_10": ("pgd_10",), "ra_50": ("pgd_50",), "ra_aa": autoattack.STANDARD}, ("soft_1", "transfer"), checks=True)
    assert budget(preset) == (
        "at most 50 PGD and 3,905 AutoAttack passes an image; at most 68 route-aware and 68 transfer passes on survivors; "
        "all self-checks"
    )
    assert budget(plan(["apgd_ce"])) == "at most 102 APGD passes on survivors"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_attacks_that_exist(preset):
    assert resolve(preset) is PRESETS[preset]


def test_plan_sorts_names_into_figures_and_survivors():
    preset = plan(("pgd_20", "reroute", "autoattack", "autoattack_plus", "autoattack_rand", "pgd_50x10", "aa_square"))
    assert preset.figures == {
        "ra_20": ("pgd_20",), "ra_aa": autoattack.STANDARD, "ra_aa_plus": autoattack.PLUS, "ra_aa_rand": autoattack.RAND,
        "ra_50x10": ("pgd_50x10",),
    }  # fmt: skip
    assert preset.survivors == ("reroute",)  # Square is one of AutoAttack's: a second run would replace the result of the first
    assert plan(("aa_square", "reroute", "reroute", "pgd_10", "pgd_10")) == Preset({"ra_10": ("pgd_10",)}, ("aa_square", "reroute"))


@pytest.mark.parametrize("classes", [2, 3])
def test_with_fewer_than_four_classes_attacks_of_this_package_replace_those_of_autoattack(classes):
    setting = Setting("Linf", classes, (3, 32, 32), routed=True, transfer=True)
    presets = {name: preset.for_classes(classes) for name, preset in PRESETS.items()}
    for name in ("standard", "full"):
        assert list(presets[name].figures)[:4] == ["ra_10", "ra_20", "ra_50", "ra_aa_few_classes"]
        assert presets[name].figures["ra_aa_few_classes"] == ("aa_apgd-ce", "apgd_t", "aa_fab-t", "aa_square")
        assert presets[name].survivors == tuple(attack for attack in PRESETS[name].survivors if attack != "apgd_t")
    dlr = "apgd_dlr_plus" if classes == 2 else "aaplus_apgd-dlr"
    plus = ("aaplus_apgd-ce", dlr, "aaplus_fab", "aaplus_square", "apgd_t_plus", "aaplus_fab-t")
    assert presets["full"].figures["ra_aa_plus_few_classes"] == plus
    assert plan(["autoattack_plus"]).for_classes(classes).figures == {"ra_aa_plus_few_classes": plus}
    assert presets["standard"].replaced == {"aa_apgd-t": "apgd_t"}
    also = {"aaplus_apgd-dlr": "apgd_dlr_plus"} if classes == 2 else {}
    assert presets["full"].replaced == {"aa_apgd-t": "apgd_t", **also, "aaplus_apgd-t": "apgd_t_plus"}
    for preset in presets.values():
        assert not any(ATTACKS[attack].obstacle(setting) for attack in preset.attacks)
        assert sum(map(len, preset.figures.values())) + len(preset.survivors) == len(preset.attacks)  # none replaces a result


def test_with_four_classes_or_without_autoattack_a_preset_stays_as_it_is():
    assert PRESETS["standard"].for_classes(4) is PRESETS["standard"]
    assert PRESETS["quick"].for_classes(2) is PRESETS["quick"]
    assert plan(["aa_apgd-t"]).for_classes(2).attacks == ["aa_apgd-t"]  # an attack that is named is not replaced


def test_a_users_attack_named_like_pgd_is_not_a_figure(registries):
    ATTACKS["pgd_mine"] = ATTACKS["reroute"]
    assert plan(("pgd_10", "pgd_mine")) == Preset({"ra_10": ("pgd_10",)}, ("pgd_mine",))


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("standart", "did you mean standard"),
        (["rerout"], "did you mean reroute"),
        (["autoatack"], "did you mean autoattack"),
        ("fastest", "the presets are quick, standard and full; attacks may be named instead, such as pgd_50 and reroute"),
        ("pgd_50", "pgd_50 is an attack and no preset: give a list of attacks"),
        (["quick"], r"quick is a preset and cannot be in a list of attacks \(advmoe evaluate --quick runs it\)"),
        ([], "no attack is named"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(preset, message):
    with pytest.raises(UserError, match=message):
        resolve(preset)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    for preset in ("standard", ("autoattack",), ("aarand_apgd-ce",)):
        with pytest.raises(UserError, match=r"^AutoAttack needs the extra autoattack: pip install 'advmoe\[autoattack\]'$"):
            resolve(preset)
    resolve("quick")


def test_docs_print_the_costs():
    docs = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    for name, preset in PRESETS.items():
        assert f"| {budget(preset)} |" in docs, name

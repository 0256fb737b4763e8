"""The attacks as data: names, plans, and budgets that say what is true."""

import re
import sys

import pytest
import torch
from toys import Toy, dense, images

from advmoe.errors import UserError
from advmoe.evaluation import ATTACKS, PRESETS, evaluate
from advmoe.evaluation.suite import AUTOATTACK, AUTOATTACK_PLUS, AUTOATTACK_RAND, plan


def steps(name):
    """Gradient steps of an attack on an image at most, from what it is called with."""
    given = ATTACKS[name].run.keywords if hasattr(ATTACKS[name].run, "keywords") else {}
    if "beam" in given:
        return given["beam"].budget * given["steps"]
    if name.startswith("pgd_"):
        return given["steps"] * given.get("restarts", 1)
    return {"apgd_ce": 100, "apgd_dlr": 100, "apgd_t": 900}.get(name, 50)


def said(preset, pattern):
    (number,) = re.search(pattern, PRESETS[preset].budget).groups()
    return int(number.replace(",", ""))


@pytest.mark.parametrize("preset", PRESETS)
def test_budgets_are_the_sums_of_the_attacks(preset):
    chosen = PRESETS[preset]
    assert said(preset, r"([\d,]+) PGD steps") == sum(steps(name) for name in ("pgd_10", "pgd_20", "pgd_50"))
    survivors = [name for name in chosen.survivors if ATTACKS[name].needs == "routing"]
    assert said(preset, r"([\d,]+) route-aware") == sum(map(steps, survivors))
    if preset == "full":
        assert said(preset, r"([\d,]+) PGD \(") == sum(steps(name) for name in chosen.survivors if name.startswith("pgd"))
        assert said(preset, r"([\d,]+) APGD") == sum(steps(name) for name in chosen.survivors if name.startswith("apgd"))
    assert ("transfer" in chosen.survivors) == ("50 transfer" in chosen.budget)
    assert ("ra_aa" in chosen.figures) == ("standard AutoAttack" in chosen.budget)
    assert chosen.checks == ("all self-checks" in chosen.budget)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_attacks_that_there_are(preset):
    assert set(PRESETS[preset].attacks) <= set(ATTACKS)


def test_plan_sorts_names_into_figures_and_survivors():
    found = plan(("pgd_20", "reroute", "autoattack", "autoattack_plus", "autoattack_rand", "pgd_50x10", "aa_square"))
    assert found.figures == {
        "ra_20": ("pgd_20",), "ra_aa": AUTOATTACK, "ra_aa_plus": AUTOATTACK_PLUS, "ra_aa_rand": AUTOATTACK_RAND,
        "ra_50x10": ("pgd_50x10",),
    }  # fmt: skip
    assert found.survivors == ("reroute", "aa_square")


def test_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    model, x = dense(), images(4)
    with pytest.raises(UserError, match="AutoAttack needs the extra autoattack"):
        evaluate(model, x, model(x).argmax(dim=1), epsilon=0.01, preset=("autoattack",))


@pytest.mark.parametrize("version", ["autoattack", "autoattack_plus", "autoattack_rand"])
def test_autoattack_leaves_the_random_state_alone_and_takes_one_image(version):
    model, x = dense(), images(1)
    before = torch.get_rng_state()
    found = evaluate(model, x, model(x).argmax(dim=1), epsilon=0.5, preset=(version,))
    assert torch.equal(before, torch.get_rng_state())
    assert found.worst == 0


def test_restarts_find_what_one_start_does_not():
    """Ten starts break every image that the first of them breaks."""
    model, x = Toy().eval(), images(32)
    y = model(x).argmax(dim=1)
    found = evaluate(model, x, y, epsilon=0.01, preset=("pgd_50", "pgd_50x10"))
    assert set(found.broken["pgd_50"]) <= set(found.broken["pgd_50x10"])
    assert found.broken["pgd_50"]

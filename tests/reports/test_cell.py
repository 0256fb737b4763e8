"""The cell of a Record: which network it is, in which setting."""

import re
from pathlib import Path

import pytest
from records import changed, changed_record, record

from advmoe.config import to_dict
from advmoe.evaluation.record_file import checked_record
from advmoe.recipes import PLUS, recipe
from advmoe.reports.cell import CELL_FIELDS, INGREDIENTS, OF_CHOICE, OF_VARIANTS, cell_of
from advmoe.reports.settings import departures, settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("method", "tied"), [("advmoe", True), ("at_small_dense", False)])
def test_all_that_the_suffix_plus_adds_is_named_by_the_suffix(method, tied):
    plus = changed("training", method, ema=PLUS["training"]["ema"])
    plus["config"]["model"] |= PLUS["model"]
    without_ties = checked_record(plus, "a file")
    plus["config"]["training"] |= PLUS["training"] | {"label_smoothing": 0.1}
    cell = cell_of(checked_record(plus, "a file"))
    assert cell.ingredients == "with -plus, label smoothing 0.1"
    assert not any("tied_share" in text for text in departures(checked_record(plus, "a file")))
    assert cell_of(without_ties).label == f"{method} with -plus" + ", tied share 0" * tied


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        ("training", {"router_target": "confusion", "router_loss": "target"}, "router loss target, router target confusion"),
        ("training", {"level_batches": "same"}, "same batches"),
        ("model", {"routers": "per_network"}, "routers per_network"),
        ("training", {"balance": "switch", "balance_weight": 0.1}, "balance switch, balance weight 0.1"),
    ],
)
def test_choices_of_routers_and_experts_are_a_variant(section, fields, words):
    assert cell_of(changed_record(section, **fields)).variant == words
    assert cell_of(changed_record(section, "at_dense", **fields)).variant == ""


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        ("training", {"tied_share": 0.67}, "tied share 0.67"),
        ("training", {"router_lr": 0.0, "tied_share": 0.5}, "router lr 0, tied share 0.5"),
        ("model", {"norms": "shared"}, "norms shared"),
    ],
)
def test_options_without_effect_on_one_expert_are_named_with_several(section, fields, words):
    cell = cell_of(changed_record(section, **fields))
    assert (cell.choice, cell.label, cell.is_of_the_paper) == (words, f"advmoe, {words}", False)
    assert cell.setting == cell_of(record()).setting
    assert cell_of(changed_record(section, "at_dense", **fields)).choice == ""
    control = changed(section, "at_moe", **fields)
    control["config"]["model"]["num_experts"] = 1
    plain, other = record("at_moe", num_experts=1), checked_record(control, "a file")
    assert (cell_of(other), settings(other)) == (cell_of(plain), settings(plain))


@pytest.mark.parametrize(
    ("suffixes", "words"),
    [
        ("-official", ", variant of the public code"),
        ("-pgd_at-official", ", variant of the public code, loss pgd_at"),
        ("-official-plus", ", variant of the public code with -plus"),
    ],
)
def test_what_a_suffix_sets_is_not_named_again(suffixes, words):
    config = to_dict(recipe(f"cifar10-resnet18-advmoe{suffixes}"))
    official = changed("training", "advmoe", **config["training"])
    official["config"]["model"] |= config["model"]
    assert cell_of(checked_record(official, "a file")).label == f"advmoe{words}"
    official["config"]["training"]["tied_share"] = 0.25
    assert cell_of(checked_record(official, "a file")).choice == "tied share 0.25"


def test_a_label_says_how_a_run_departs_from_its_method():
    assert cell_of(record("advmoe")).label == "advmoe"
    assert cell_of(record("at_moe", num_experts=1)).label == "at_moe, one expert"
    assert cell_of(changed_record("training", level_batches="same")).label == "advmoe, same batches"
    beta = cell_of(changed_record("training", "at_dense", beta=9.0))
    assert (beta.label, beta.is_of_the_paper) == ("at_dense, beta 9", False)


def test_files_of_ingredients_are_named_by_their_kind():
    cell = cell_of(changed_record("training", teacher="runs/teacher"))
    assert (cell.label, cell.is_of_the_paper) == ("advmoe, teacher", False)
    cell = cell_of(changed_record("data", "at_dense", generated="images.npz"))
    assert (cell.label, cell.is_of_the_paper) == ("at_dense, generated images", False)


def test_a_run_with_any_option_beyond_the_paper_is_not_of_the_paper():
    section = (ROOT / "docs/method.md").read_text().partition("\n## Beyond the paper\n")[2].partition("\n## ")[0]
    options = {flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", section)}
    named = {name.partition(".")[2] for name in (*OF_VARIANTS, *OF_CHOICE, *INGREDIENTS)}
    assert options - named == {"crop_padding", "no_flip"}


def test_a_cell_ignores_settings_that_its_method_does_not_use():
    dense, wide = cell_of(record("at_dense", model_scale=0.2)), cell_of(record("at_small_dense", num_experts=4))
    assert (dense.model_scale, dense.num_experts) == (1.0, 1)
    assert (wide.model_scale, wide.num_experts) == (0.5, 1)
    assert cell_of(record(num_experts=4)).num_experts == 4
    assert cell_of(changed_record("model", width=64)).width is None
    assert cell_of(changed_record("model", width=32)).width == 32
    assert set(CELL_FIELDS) >= {
        "dataset",
        "backbone",
        "width",
        "method",
        "model_scale",
        "epsilon",
        "norm",
        "epochs",
        "test_images",
    }

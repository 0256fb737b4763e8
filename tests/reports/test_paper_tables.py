"""Tables A1 and A2 beside our runs, and separate tables for our runs of other settings."""

import pytest
from records import attacked, content, record, with_settings

from advmoe.attacks.presets import PRESETS
from advmoe.config import to_dict
from advmoe.paper import printed_cells
from advmoe.recipes import recipe
from advmoe.reports.paper_tables import tables


def paper_run(name, seed=0, **changes):
    """A Record of the recipe of a printed cell on all of CIFAR-10; its figures depend on the seed."""
    config = to_dict(recipe(name)) | {"seed": seed}
    data = {"dataset": "cifar10", "train_images": 49_000, "test_images": 10_000, "epsilon": 8 / 255, "config": config}
    figures = {"sa": 80.0 + seed, "ra": {"50": 51.0 + seed}, "ra_aa": 46.0 + seed, "ra_worst": 45.0 + seed, "gmacs": 0.15}
    backbone = config["model"]["backbone"]
    trusted = {**content()["evaluation"], "checks": []}
    fields = {"backbone": backbone, "evaluation": trusted, "history": []}
    return record(config["method"], seed, **(data | figures | fields | changes))


def rows_of(table):
    """(backbone, r, method) -> column -> entry."""
    named = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    return {(row["backbone"].text, row["r"].text, row["method"].text): row for row in named}


def test_every_printed_cell_has_a_row_even_if_nothing_was_run():
    a1, a2 = tables([])
    assert (a1.name, a2.name) == ("table_a1", "table_a2")
    assert [len(a1.rows), len(a2.rows)] == [sum(cell.table == name for cell in printed_cells()) for name in ("A1", "A2")]
    for table in (a1, a2):
        for row in rows_of(table).values():
            texts = {name: entry.text for name, entry in row.items() if name.endswith(", ours") or name == "n"}
            assert set(texts.values()) == {"not run"}
            assert row["RA-50, difference"].text == ""


def test_our_run_is_beside_the_printed_figures():
    runs = [paper_run("cifar10-resnet18-advmoe-steps10", seed) for seed in (0, 1, 2)]
    a1, a2 = tables(runs)
    row = rows_of(a1)["ResNet-18", "0.5", "AdvMoE"]
    assert row["n"].text == "3"
    assert a1.run_rows == (a1.rows[0],)
    assert a1.rows[0][2].text == "AdvMoE"
    assert (a2.run_rows, a2.not_run) == ((), len(a2.rows))
    assert (row["RA-50, printed"].text, row["RA-50, ours"].text, row["RA-50, difference"].text) == (
        "52.22 ± 0.14",
        "52.00 ± 1.00",
        "-0.22",
    )
    assert (row["RA-AA, ours"].text, row["RA-AA, difference"].text) == ("47.00 ± 1.00", "+0.56")
    assert (row["SA, ours"].value, row["SA, ours"].spread) == (81.0, 1.0)
    assert row["RA-worst, ours"].text == "46.00 ± 1.00"
    assert (row["GMACs, printed"].text, row["GMACs, ours"].text) == ("0.15", "0.1500")
    assert rows_of(a1)["ResNet-18", "0.5", "AT (MoE)"]["RA-50, ours"].text == "not run"
    assert rows_of(a2)["ResNet-18", "0.5", "AdvMoE"]["RA-50, ours"].text == "not run"


def test_one_run_has_no_deviation_and_a_missing_figure_says_so():
    run = paper_run("cifar10-wrn28_10-at_sparse-r0.8", ra_aa=..., ra_worst=..., ra_worst_quick=48.0)
    _, a2 = tables([attacked(run, *PRESETS["quick"].attacks)])
    row = rows_of(a2)["WRN-28-10", "0.8", "AT (Sparse)"]
    assert (row["RA-50, ours"].text, row["RA-50, ours"].spread) == ("51.00", None)
    assert (row["RA-AA, ours"].text, row["RA-worst, ours"].text) == ("not measured", "not measured")
    assert row["RA-worst (quick), ours"].text == "48.00"


def test_a_figure_of_fewer_seeds_than_the_row_says_so():
    runs = [paper_run("cifar10-resnet18-at_moe"), paper_run("cifar10-resnet18-at_moe", 1, ra_aa=...)]
    row = rows_of(tables(runs)[1])["ResNet-18", "0.5", "AT (MoE)"]
    assert (row["n"].text, row["SA, ours"].text, row["RA-AA, ours"].text) == ("2", "80.50 ± 0.71", "46.00 (n = 1)")


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "cifar10-jpeg"},
        {"test_images": 200},
        {"train_images": 2000},
        {"epsilon": 4 / 255},
        {"norm": "L2"},
        {"config": {"training": {"epochs": 10}}},
        {"config": {"training": {"lr": 0.05}}},
        {"config": {"training": {"tied_share": 0.5}}},
        {"config": {"model": {"width": 16}}},
        {"config": {"model": {"num_experts": 4}}},
        {"config": {"attack": {"num_steps": 3}}},
        {"config": {"attack": {"epsilon": 0.05}}},
    ],
)
def test_a_run_of_another_setting_is_never_in_the_papers_row(changes):
    run = paper_run("cifar10-resnet18-advmoe")
    for section, fields in changes.pop("config", {}).items():
        with_settings(run, section, **fields)
    a1, a2, ours = tables([run.model_copy(update=changes)])
    for table in (a1, a2):
        assert {row["RA-50, ours"].text for row in rows_of(table).values()} == {"not run"}
    assert ours.title.startswith("Our setting: ")
    assert [row["RA-50"].text for row in rows_of(ours).values()].count("51.00") == 1


def test_cells_that_cannot_be_right_are_marked_with_the_reason():
    a1, a2 = tables([])
    small = rows_of(a2)["ResNet-18", "0.2", "AT (S-Dense)"]
    (mark,) = small["GMACs, printed"].marks
    assert "cost goes with r squared: 96 % less than dense, not 76 %" in a2.notes[mark - 1]
    assert small["less than dense, %, printed"].marks == (mark,)
    assert rows_of(a2)["ResNet-18", "0.5", "AdvMoE"]["GMACs, printed"].marks == ()
    assert len(rows_of(a1)["WRN-28-10", "0.5", "AdvMoE"]["GMACs, printed"].marks) == 2


def test_unreliable_autoattack_is_marked():
    run = paper_run("cifar10-resnet18-advmoe", evaluation=content()["evaluation"])
    a2 = tables([run])[1]
    (mark,) = rows_of(a2)["ResNet-18", "0.5", "AdvMoE"]["RA-AA, ours"].marks
    assert "AutoAttack alone overestimates" in a2.notes[mark - 1]


def test_each_of_our_settings_has_a_table_that_describes_it():
    runs = [record("at_dense"), record(seed=0), record(seed=1), record(model_scale=0.2), record(epochs=9)]
    _, _, short, long = sorted(tables(runs), key=lambda table: (table.name.startswith("ours"), "9 epochs" in table.title))
    assert "fashion-mnist, resnet18 (width 16), 6 epochs" in short.title
    assert "epsilon 0.1" in short.title
    row = rows_of(short)["ResNet-18", "0.5", "AdvMoE"]
    assert (row["n"].text, row["N"].text, row["RA-worst"].text) == ("2", "2", "49.25 ± 0.35")
    assert rows_of(short)["ResNet-18", "0.2", "AdvMoE"]["n"].text == "1"
    assert "Not a setting of the paper" in long.about


def test_another_method_in_a_setting_of_the_paper_can_be_compared_with_its_table():
    run = paper_run("cifar10-resnet18-at_moe-steps10").model_copy(update={"method": "mine"})
    ours = tables([run])[2]
    assert ours.about.startswith("The setting of table A1, which prints no such cells: cifar10, resnet18, 100 epochs")
    with_settings(run, "training", lr=0.05)
    assert tables([run])[2].about.startswith("Not a setting of the paper; do not compare with its figures")


def test_what_was_not_run_in_our_setting_is_listed():
    ours = tables([record("standard"), record(model_scale=0.2), record()])[2]
    rows = rows_of(ours)
    missing = {(scale, method) for (_, scale, method), row in rows.items() if row["RA-50"].text == "not run"}
    scaled = {(scale, title) for scale in ("0.2", "0.5") for title in ("AT (S-Dense)", "AT (Sparse)", "AT (MoE)")}
    assert missing == scaled | {("1", "AT (Dense)")}
    assert [(scale, method) for _, scale, method in rows] == [  # what was run comes first
        ("1", "standard training"), ("0.2", "AdvMoE"), ("0.5", "AdvMoE"), ("1", "AT (Dense)"), ("0.2", "AT (S-Dense)"),
        ("0.5", "AT (S-Dense)"), ("0.2", "AT (Sparse)"), ("0.5", "AT (Sparse)"), ("0.2", "AT (MoE)"), ("0.5", "AT (MoE)"),
    ]  # fmt: skip
    assert (len(ours.run_rows), ours.not_run, len(ours.other_rows)) == (3, 7, 7)


def test_an_ablation_is_no_run_of_its_method():
    same_batches = with_settings(record(), "training", level_batches="same")
    model = with_settings(record(), "model", routers="per_network", bank="disjoint", norms="shared")
    official = with_settings(
        model, "training", level_batches="same", router_loss="target", router_target="label_mod_n", router_target_weight=6.0,
        router_consistency=6.0,
    )  # fmt: skip
    rows = rows_of(tables([same_batches, official, record("at_moe", num_experts=1)])[2])
    texts = {method: row["RA-50"].text for (_, _, method), row in rows.items() if row["N"].text != "1"}
    assert texts["AdvMoE, same batches"] == texts["AdvMoE, variant of the public code"] == "51.00"
    assert texts["AdvMoE"] == texts["AT (MoE)"] == "not run"


def test_runs_in_the_papers_table_are_not_missing_in_ours():
    ours = tables([paper_run("cifar10-resnet18-advmoe"), paper_run("cifar10-resnet18-standard")])[2]
    methods = {method for _, _, method in rows_of(ours)}
    assert methods == {"standard training", "AT (Dense)", "AT (S-Dense)", "AT (Sparse)", "AT (MoE)"}


def test_settings_of_single_rows_are_notes_and_shared_ones_are_reported_once():
    runs = [record("at_dense"), record()]
    for run in runs:
        with_settings(run, "training", lr=0.05)
    with_settings(runs[1], "training", init_from="a_run")
    ours = tables(runs)[2]
    assert "training.lr 0.05 (0.1)" in ours.about
    marks = {method: row["method"].marks for (_, _, method), row in rows_of(ours).items()}
    assert [ours.notes[mark - 1] for mark in marks["AdvMoE"]] == ["In this row also: training.init_from a_run (none)."]
    assert marks["AT (Dense)"] == ()


def test_names_are_unique_and_valid_names_of_files():
    runs = [record(dataset="../my data\n%", test_images=number) for number in (100, 200, 300)]
    names = [table.name for table in tables(runs)[2:]]
    assert len(set(names)) == 3
    assert not any(set(name) & set("/\n% ") for name in names)


def note_of(table, entry):
    return " ".join(table.notes[mark - 1] for mark in entry.marks)


def test_a_list_of_attacks_is_named_and_not_called_quick():
    run = attacked(record(ra_worst=..., ra_worst_quick=48.0), "pgd_10")
    ours = tables([run])[2]
    assert "RA-worst (quick)" not in ours.columns
    entry = rows_of(ours)["ResNet-18", "0.5", "AdvMoE"]["RA-worst (listed attacks)"]
    assert (entry.text, "The worst case over pgd_10;" in note_of(ours, entry)) == ("48.00", True)


def test_seeds_attacked_differently_show_no_worst_case():
    ours = tables([record(), attacked(record(seed=1), "pgd_10")])[2]
    row = rows_of(ours)["ResNet-18", "0.5", "AdvMoE"]
    assert (row["RA-worst"].text, row["RA-worst"].value, row["n"].text) == ("not shown", None, "2")
    assert "attacked by different attacks" in note_of(ours, row["RA-worst"])
    assert row["SA"].value is not None


def test_a_note_says_that_seeds_were_trained_by_different_code():
    code = [{"advmoe": "0.1.0", "commit": "1a2b"}]
    *_, table = tables([record("at_dense", 0, trained_by=code), record("at_dense", 1)])
    (number,) = rows_of(table)["ResNet-18", "1", "AT (Dense)"]["n"].marks
    assert table.notes[number - 1] == (
        "The seeds were trained by different code: advmoe 0.1.0, commit 1a2b; advmoe unknown, commit unknown."
    )
    *_, table = tables([record("at_dense", 0, trained_by=code), record("at_dense", 1, trained_by=code)])
    assert rows_of(table)["ResNet-18", "1", "AT (Dense)"]["n"].marks == ()


def test_rows_under_different_attacks_name_them():
    ours = tables([record(), attacked(record("at_moe"), "pgd_10", "pgd_20")])[2]
    rows = rows_of(ours)
    assert "over pgd_50;" in note_of(ours, rows["ResNet-18", "0.5", "AdvMoE"]["RA-worst"])
    assert "over pgd_10, pgd_20;" in note_of(ours, rows["ResNet-18", "0.5", "AT (MoE)"]["RA-worst"])
    assert not tables([record(), record("at_moe")])[2].notes[1:]  # the unreliable AutoAttack's alone


def test_tables_say_how_the_intervals_are_computed():
    assert all("t(n - 1, 0.975) s / sqrt(n)" in table.about for table in tables([record()]))

"""The table of measures; a new entry is a new column everywhere."""

import re
from pathlib import Path

import pytest
from records import quick, record

from advmoe.attacks.registry import ATTACKS
from advmoe.reports import html, measures, paper_tables, plots, summaries, tables
from advmoe.reports.measures import BY_NAME, MEASURES, QUICK, QUICK_OF_VERSION_0_1, Measure, attacks_of, label, measured, worst_of

SOURCE = Path(measures.__file__).parents[1]


def test_names_are_unique_and_every_column_has_a_label():
    assert len(BY_NAME) == len(MEASURES)
    assert len({measure.column for measure in MEASURES}) == len(MEASURES)
    assert BY_NAME["reduction"].column == "less than dense, %"
    assert (BY_NAME["gmacs"].column, BY_NAME["ra_50"].column) == ("GMACs", "RA-50")


def test_values_are_the_records():
    values = {measure.name: measure.value(record(ra_aa_rand=11.0)) for measure in MEASURES}
    assert values.items() >= {
        "ra_worst": 49.0, "ra_worst_quick": None, "ra_worst_former_quick": None, "ra_worst_listed": None,
        "sa": 79.0, "ra_10": 53.0, "ra_20": 52.0, "ra_50": 51.0,
        "ra_aa": 49.5, "ra_aa_plus": None, "ra_aa_rand": 11.0,
        "ra_paths": None, "ra_paths_sampled": None, "gmacs": 0.01, "reduction": 75.0,
    }.items()  # fmt: skip


def test_autoattack_for_few_classes_has_another_name_than_autoattack():
    run = record(ra_aa=...)
    run.evaluation.figures |= {"ra_aa_few_classes": 48.0, "ra_aa_plus_few_classes": 47.0}
    values = {measure.label: measure.value(run) for measure in measured([run])}
    assert (values["RA-AA (few classes)"], values["RA-AA-plus (few classes)"]) == (48.0, 47.0)
    assert "RA-AA" not in values
    assert values["RA-worst"] == 49.0


def test_a_worst_case_is_named_after_its_attacks():
    partial = {"ra_worst": ..., "ra_worst_quick": 40.0}
    names = [worst_of(run).name for run in (record(), quick(record(**partial)), record(**partial))]
    assert names == [
        "ra_worst",
        "ra_worst_quick",
        "ra_worst_listed",
    ]
    assert not worst_of(record()).upper_bound
    assert worst_of(quick(record(**partial))).upper_bound


def test_the_former_quick_preset_is_distinguished_from_the_present_one():
    former = record(ra_worst=..., ra_worst_quick=40.0)
    attacks = dict.fromkeys(QUICK_OF_VERSION_0_1)
    former = former.model_copy(update={"evaluation": former.evaluation.model_copy(update={"attacks": attacks})})
    assert worst_of(former).label == "RA-worst (quick of 0.1)"
    assert BY_NAME["ra_worst_quick"].value(former) is None
    assert summaries.attacks_in_words(attacks_of(former)) == "the preset quick of version 0.1"


def with_attacks(run, attacks, left_out):
    """The Record with these attacks and those left out."""
    evaluation = run.evaluation.model_copy(update={"attacks": dict.fromkeys(attacks), "left_out": dict.fromkeys(left_out, "why")})
    return run.model_copy(update={"evaluation": evaluation})


def test_attacks_on_routing_left_out_of_a_routed_network_are_missing():
    """In L2, or with a pathway budget of 0: on a dense network they could not break anything, on a routed one they could."""
    routing = [name for name in QUICK if ATTACKS[name].needs == "routing"]
    partial = {"ra_worst": ..., "ra_worst_quick": 40.0, "norm": "L2"}
    routed, dense = (with_attacks(record(method, **partial), QUICK - set(routing), routing) for method in ("advmoe", "at_dense"))
    assert attacks_of(dense) == QUICK > attacks_of(routed)
    assert (worst_of(dense).name, worst_of(routed).name) == ("ra_worst_quick", "ra_worst_listed")
    for traces in ({"layers": []}, {"evaluation": routed.evaluation.model_copy(update={"routing": None})}):
        assert attacks_of(routed.model_copy(update=traces)) == attacks_of(routed)  # one trace of routing is enough
    without_paths = with_attacks(record(), ["pgd_50", "reroute"], ["paths"])
    without_paths = without_paths.model_copy(update={"layers": []})
    without_paths.evaluation.routing = None
    assert attacks_of(without_paths) == {"pgd_50", "reroute"}


def test_other_numbers_of_steps_follow_the_listed_ones():
    names = [measure.label for measure in measured([record(ra={"10": 1.0, "200": 2.0, "7": 3.0})])]
    assert names == ["RA-worst", "SA", "RA-10", "RA-7", "RA-200", "RA-AA"]


def test_a_figure_that_is_no_measure_has_a_label():
    assert (label("ra_50x10"), label("sa")) == ("RA-50X10", "SA")


@pytest.fixture
def added_measure(monkeypatch):
    """Add an entry to the table: the accuracy by the route of the attacked image."""
    entry = Measure("ra_router", "RA-router", lambda run: run.evaluation.routing and run.evaluation.routing.ra_router)
    monkeypatch.setattr(measures, "MEASURES", (*MEASURES, entry))
    monkeypatch.setitem(BY_NAME, "ra_router", entry)
    for module in (summaries, html, paper_tables):
        monkeypatch.setattr(module, "SUMMARY", (*measures.SUMMARY, entry))
    monkeypatch.setitem(plots.DRAWN, "ra_router", entry)


@pytest.mark.usefixtures("added_measure")
def test_a_new_entry_is_a_new_column():
    run = record()
    assert "RA-router" in [column.header for column in tables.record_table([run], "title").columns]
    of_run = summaries.summarise([run])
    assert of_run[0].figures["ra_router"].mean == 60.0
    assert "RA-router" in html._overview(of_run).columns
    assert "RA-router" in paper_tables.tables([run])[2].columns


def test_a_label_is_written_once():
    texts = {path: path.read_text() for path in SOURCE.rglob("*.py") if "evaluation" not in path.parts}
    files = [path.name for path, text in texts.items() if re.search(r"""["']RA-worst \((quick|listed attacks)\)""", text)]
    assert files == ["measures.py"]

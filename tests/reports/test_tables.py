"""Tables from Records."""

import pytest
import records
from rich.console import Console

from advmoe.reports.tables import caught_alone, check_lines, evaluation_lines, record_table


def record(method="advmoe", worst=30.0, complete=True, unreliable=False, **more):
    checks = [{"number": 5, "status": "fail" if unreliable else "pass", "name": "RA-AA near RA-worst", "detail": "[1.0] points"}]
    fields = {"sa": 80.0, "ra": {"10": 51.0, "50": 50.0}, "ra_aa": ..., "ra_worst": ..., "gmacs": 0.5, "gmacs_dense": 1.0}
    fields |= {"reduction": 50.0, "ra_worst" if complete else "ra_worst_quick": worst}
    result = records.record(method, **(fields | more), evaluation=records.content()["evaluation"] | {"checks": checks})
    return result if complete else records.quick(result)


def cells(table):
    """Column title -> its cells."""
    return {str(column.header): list(column.cells) for column in table.columns}


def test_worst_case_comes_first():
    columns = cells(record_table([record(ra_aa=40.0)], "title"))
    assert list(columns) == ["method", "RA-worst", "SA", "RA-10", "RA-50", "RA-AA", "GMACs", "against dense"]
    assert [value for (value,) in columns.values()] == ["advmoe", "30.0", "80.0", "51.0", "50.0", "40.0", "0.5000", "-50 %"]


def test_quick_and_full_worst_cases_are_in_separate_columns():
    columns = cells(record_table([record(ra_aa=40.0), record("at_dense", 45.0, complete=False)], "title"))
    assert list(columns)[1:4] == ["RA-worst", "RA-worst (quick)", "SA"]
    assert (columns["RA-worst"], columns["RA-worst (quick)"]) == (["30.0", ""], ["", "45.0"])
    assert columns["RA-AA"] == ["40.0", ""]


def test_records_of_different_steps_keep_their_columns():
    columns = cells(record_table([record(ra={"50": 1.0}), record(ra={"10": 2.0, "200": 3.0})], "title"))
    assert list(columns)[3:6] == ["RA-10", "RA-50", "RA-200"]
    assert (columns["RA-10"], columns["RA-50"], columns["RA-200"]) == (["", "2.0"], ["1.0", ""], ["", "3.0"])


def test_unreliable_autoattack_is_marked():
    columns = cells(record_table([record(ra_aa=40.0, unreliable=True), record(ra_aa=31.0)], "title"))
    assert columns["RA-AA"] == ["40.0 (unreliable)", "31.0"]
    columns = cells(record_table([record(ra_aa_plus=40.0, unreliable=True)], "title"))
    assert columns["RA-AA-plus"] == ["40.0 (unreliable)"]
    columns = cells(record_table([record(ra_aa=40.0, ra_aa_plus=39.0, unreliable=True)], "title"))
    assert columns["RA-AA-plus"] == ["39.0"]


def test_dense_network_has_no_reduction():
    assert cells(record_table([record(gmacs=1.0, reduction=0.0)], "title"))["against dense"] == ["1 x"]


@pytest.mark.parametrize("complete", [True, False])
def test_worst_of_either_kind(complete):
    assert record(complete=complete).worst == 30.0


def evaluated(**changes):
    """A Record under PGD-50 alone."""
    result = {
        "images": 20, "figures": {"ra_worst_quick": 25.0, "sa": 75.0, "ra_50": 50.0},
        "intervals": {"ra_worst_quick": (10.0, 40.0), "sa": (60.0, 85.0), "ra_50": (35.0, 65.0)},
        "attacks": {"pgd_50": {"attacked": 15, "broken": 5, "seconds": 1.25}},
        "left_out": {"reroute": "written for Linf alone", "transfer": "no network", "soft_1": "written for Linf alone"},
        "routing": {
            "ra_router": 70.0, "ra_expert": 55.0, "flip_rate": 12.5, "overlap": [90.0, 100.0], "load": [[3, 1], [2, 1, 1]],
            "load_adv": [[2, 2], [4, 0, 0]], "fixed_expert_sa": [60.0, 20.0], "fixed_expert_ra": [10.0, 5.0],
        },
        "checks": [
            {"number": 4, "name": "Square adds nothing", "status": "skipped", "detail": "was not run"},
            {"number": 11, "name": "images are valid", "status": "fail", "detail": "at [0, 1]"},
        ],
    }  # fmt: skip
    return records.record(ra_aa=..., ra_worst=..., ra_worst_quick=25.0, evaluation=result | changes)


def test_the_lines_of_an_evaluation_start_with_the_worst_case():
    result = evaluated()
    assert [*evaluation_lines(result), *map(str, check_lines(result.evaluation))] == [
        "RA-worst (listed attacks)  25.0 %  95 % interval 10.0 to 40.0",
        "SA                         75.0 %  95 % interval 60.0 to 85.0",
        "RA-50                      50.0 %  95 % interval 35.0 to 65.0",
        "pgd_50                   broke    5 of   15,    0 only by it, in 1.2 s",
        "left out, written for Linf alone: reroute, soft_1",
        "left out, no network: transfer",
        "RA-router 70.0 %, RA-expert 55.0 %; routes of 12.5 % of the correctly classified images change under PGD-50",
        "correctly classified images that keep their expert, per layer: 90 100 %",
        "load of the experts, per layer: 75/25 50/25/25 %; under attack: 50/50 100/0/0 %",
        "expert 0, 1, ... in every layer: SA 60.0 20.0, RA-10 10.0 5.0",
        "( 4) skipped Square adds nothing: was not run",
        "(11) fail    images are valid: at [0, 1]",
    ]


def test_lines_of_a_dense_network_have_no_routing():
    assert not any("RA-router" in line for line in evaluation_lines(evaluated(routing=None)))


def test_table_prints():
    console = Console(record=True, width=120)
    console.print(record_table([record(ra_aa=40.0)], "fashion"))
    assert "fashion; SA and RA in %" in console.export_text()


def test_an_attack_catches_alone_what_no_other_one_broke():
    evaluation = record().evaluation
    assert caught_alone(evaluation) == {}
    evaluation.broken = {"pgd_10": [1, 2], "pgd_50": [2, 3], "pma": [4]}
    assert caught_alone(evaluation) == {"pgd_10": 1, "pgd_50": 1, "pma": 1}

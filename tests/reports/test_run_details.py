"""A Record in words."""

from records import old_record, record
from records import quick as by_quick

from advmoe.reports.run_details import run_of


def test_headline_has_the_worst_case_and_what_failed():
    assert run_of(record()).headline == "RA-worst 49.0 %, SA 79.0 %; 1 check failed"
    quick = by_quick(record(ra_worst=..., ra_worst_quick=51.0))
    quick.evaluation.checks = []
    assert run_of(quick).headline == "RA-worst (quick) 51.0 %, SA 79.0 %"


def test_facts_have_intervals():
    facts = dict(run_of(record()).facts)
    assert facts["RA-worst"] == "49.0 % (95 % interval 44.0 to 54.0)"
    assert facts["RA-AA"] == "49.5 % (95 % interval 44.5 to 54.5)"
    assert facts["GMACs"] == "0.0100 (75 % less than dense)"
    assert dict(run_of(record(gmacs=0.056, reduction=-40.0)).facts)["GMACs"] == "0.0560 (40 % more than dense)"
    assert dict(run_of(record("at_dense", gmacs=0.04, reduction=0.0)).facts)["GMACs"] == "0.0400"
    assert "RA-router, RA-expert" in facts
    assert "RA-router, RA-expert" not in dict(run_of(record("at_dense")).facts)


def test_tables_of_a_run():
    assert [table.title for table in run_of(record()).tables] == [
        "Attacks", "Accuracy of 200 images under PGD-10, by radius", "Epochs, on held-out images",
    ]  # fmt: skip
    assert [table.title for table in run_of(old_record()).tables] == ["Attacks"]
    attacks, curve, epochs = run_of(record()).tables
    words = {row[0].text: row[-1].text for row in attacks.rows}
    assert words["pgd_50"] == "PGD on cross-entropy, 50 steps of epsilon / 4, random start"
    assert [row[0].value for row in curve.rows] == [0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.4]
    assert [entry.value for entry in epochs.rows[0]] == [1, 1, 31.6, 21.2, 2.1]


def test_configuration_and_provenance_are_complete():
    run = run_of(record("advmoe", 3))
    assert "model_scale: 0.5" in run.config
    provenance = dict(run.provenance)
    assert provenance["advmoe"] == "0.1.0, commit b999d11c95c2007955cc1da9"
    assert provenance["hardware"] == "cpu a processor, cores 2, threads 1"
    assert provenance["seeds"] == "3 in training, 0 in evaluation"
    assert "attack gradients" not in provenance  # a Record of before that field
    new = record("advmoe", 3, attack_precision="bfloat16")
    assert dict(run_of(new).provenance) == {**provenance, "attack gradients": "bfloat16"}
    assert provenance["time"] == "trained in 95 s, evaluated in 42 s; 2026-11-22T21:42:03+00:00"
    unknown = record("advmoe", 3, train_seconds=0.0)  # of a saved network without a Record
    assert dict(run_of(unknown).provenance)["time"] == "evaluated in 42 s; 2026-11-22T21:42:03+00:00"


def test_the_code_that_trained_a_network_is_listed_beside_that_of_its_evaluation():
    code = [{"advmoe": "0.1.0", "commit": "1a2b"}, {"advmoe": "0.2.0"}]
    provenance = dict(run_of(record(trained_by=code)).provenance)
    assert provenance["trained by"] == "advmoe 0.1.0, commit 1a2b; then advmoe 0.2.0, commit unknown"
    assert provenance["advmoe"] == "0.1.0, commit b999d11c95c2007955cc1da9"
    assert "trained by" not in dict(run_of(record()).provenance)


def test_record_without_commit_or_name_is_reported():
    run = run_of(old_record(commit=None))
    assert run.name == ""
    assert dict(run.provenance)["advmoe"] == "0.1.0, commit unknown"

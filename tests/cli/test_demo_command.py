"""`advmoe demo`: runs, Records and a report that answers three questions."""

import json

import pytest

from advmoe.cli.main import main
from advmoe.reports.collect import collect
from advmoe.reports.verdict import verdict
from advmoe.runs.status import State, find_runs, read_run


def test_demo_writes_records_and_a_report(tmp_path, monkeypatch, capsys, caplog, tiny):
    def small(name):
        method, _, control = name.removeprefix("demo-").partition("-")
        return tiny(method, epochs=1, num_experts=1 if control else 2)

    monkeypatch.setattr("advmoe.cli.demo.recipe", small)
    out = tmp_path / "demo[a]"
    assert main(["demo", "--out", str(out), "--device", "cpu"]) == 0
    records = json.loads((out / "records.json").read_text())
    assert [record["method"] for record in records] == ["standard", "at_dense", "at_small_dense", "at_moe", "advmoe"]
    output = capsys.readouterr().out
    assert "holds no run yet" not in caplog.text  # a new demo resumes nothing
    assert "at_small_dense" in output
    questions = ("How robust?", "At what cost?", "Does choosing an expert help?")
    assert all(question in output for question in questions)
    assert output.endswith(f"\nMore attacks: advmoe evaluate '{out}/advmoe' --standard\nThe report: {out}/report.html\n")
    page = (out / "report.html").read_text()
    first = page[page.index('id="verdict"') :]
    assert [first.index(question) for question in questions] == sorted(first.index(question) for question in questions)
    (choice,) = [line for line in output.splitlines() if line.startswith(questions[-1])]
    assert choice in map(str, verdict(collect(out)))  # as in `advmoe report`
    assert first.count(f"<strong>{questions[-1]}") == 1
    assert {read_run(run).state for run in find_runs(out)} == {State.DONE}
    caplog.clear()
    collected = [record.run for record in collect(out)]
    assert caplog.messages == []
    assert sorted(collected) == sorted(record["run"] for record in records)  # each once, although records.json has them too
    monkeypatch.setattr("advmoe.cli.demo.write_report", lambda *_: None)  # it takes seconds, and is in the first call
    assert main(["demo", "--out", str(out), "--device", "cpu"]) == 0
    assert "epoch 1/1" not in capsys.readouterr().out


@pytest.mark.slow
def test_demo_shows_that_robust_training_works(tmp_path):
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    ra = {record["method"]: record["ra"]["50"] for record in json.loads((tmp_path / "demo/records.json").read_text())}
    assert all(ra[method] >= ra["standard"] + 15 for method in ("at_small_dense", "at_dense", "advmoe"))

import json

import pytest

from advmoe.benchmark import runner
from advmoe.benchmark.rows import Row
from advmoe.benchmark.suites import Suite
from advmoe.cli.main import main


def test_one_suite_prints_rows_and_writes_them(tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert main(["benchmark", "--suite", "data", "--quick", "--json", str(out), "--device", "cpu", "--threads", "1"]) == 0
    report = json.loads(out.read_text())
    assert [row["what"] for row in report["rows"]] == ["loading", "AdvMoE iteration", "loading / AdvMoE iteration"]
    assert report["machine"]["threads"] == 1
    assert "batch 6: loading / AdvMoE iteration" in capsys.readouterr().out


def test_a_failed_row_ends_with_status_1(monkeypatch):
    row = Row(suite="data", case="c", what="w", value=None, failed="RuntimeError: no such kernel")
    monkeypatch.setitem(runner.SUITES, "data", Suite(lambda setup: iter([row])))
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--suite", "data", "--device", "cpu"])
    assert stop.value.code == 1


def test_an_unknown_suite_and_an_impossible_file_are_one_line(tmp_path, capsys):
    assert main(["benchmark", "--suite", "inferense"]) == 2
    assert "unknown suite 'inferense': did you mean inference" in capsys.readouterr().err
    assert main(["benchmark", "--suite", "data", "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "no such folder for the results" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_one_line(capsys):
    assert main(["benchmark", "--suite", "data", "--device", "cuda:77"]) == 2
    assert "device 'cuda:77' is not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rounds", "0"], "rounds must be at least 1, not 0"), (["--width", "8", "--quick"], "--quick sets width")],
)
def test_rounds_and_width_that_make_no_sense_are_one_line(capsys, arguments, message):
    assert main(["benchmark", "--suite", "data", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_rounds_and_width_reach_the_suite(monkeypatch, capsys):
    seen = []
    row = Row(suite="data", case="c", what="w", value=1.0)
    monkeypatch.setitem(runner.SUITES, "data", Suite(lambda setup: [seen.append(setup.scale), row][1:]))
    assert main(["benchmark", "--suite", "data", "--rounds", "3", "--width", "16", "--device", "cpu"]) == 0
    assert [(scale.rounds, scale.width) for scale in seen] == [(3, 16)]

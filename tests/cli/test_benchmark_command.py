import json

from advmoe import benchmark
from advmoe.benchmark import Scale
from advmoe.cli import benchmark as command
from advmoe.cli.main import main

TOY = Scale(width=4, batch=4, training_batch=8, attack_batch=2, attack_steps=2, side=16, rounds=1)


def test_one_suite_prints_rows_and_writes_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "measure", lambda *args, **named: benchmark.run(*args, **named, scale=TOY))
    assert main(["benchmark", "--suite", "data", "--json", str(tmp_path / "found.json"), "--device", "cpu", "--threads", "1"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [set(row) >= {"name", "ratio", "target", "met", "spread"} for row in found["rows"]] == [True]
    assert found["machine"]["threads"] == 1
    assert found["rows"][0]["name"] in capsys.readouterr().out


def test_an_unknown_suite_and_an_impossible_file_are_one_line(tmp_path, capsys):
    assert main(["benchmark", "--suite", "inferense"]) == 2
    assert "unknown suite 'inferense': did you mean inference?" in capsys.readouterr().err
    assert main(["benchmark", "--suite", "data", "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "a folder that exists" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_one_line(capsys):
    assert main(["benchmark", "--suite", "data", "--device", "cuda:77"]) == 2
    assert "device 'cuda:77' is not to be had here" in capsys.readouterr().err

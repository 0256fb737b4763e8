"""`advmoe report`: everything is made from Records, each bad file is one warning, and no file is half written."""

import csv
import json
import threading

import pytest
from records import content, old_content, write

from advmoe.cli.main import main
from advmoe.files import drafted
from advmoe.reports.plots import FIGURES


def figures_of(path):
    """(method, r) -> RA-worst, from the CSV file of one of our tables."""
    return {(row["method"], row["r"]): row["RA-worst"] for row in csv.DictReader(path.read_text().splitlines())}


def names(out):
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


@pytest.fixture
def runs(tmp_path):
    """A folder of evaluated runs: four networks, two seeds of one."""
    runs = [content(), content(seed=1), content("at_dense"), content("at_moe"), content(model_scale=0.2)]
    for number, run in enumerate(runs):
        write(tmp_path / f"runs/{number}/record.json", run)
    return tmp_path / "runs"


@pytest.fixture
def quick(monkeypatch):
    """No figures: they take seconds and are tested elsewhere."""
    monkeypatch.setattr("advmoe.reports.write.FIGURES", {})


def test_everything_is_made_from_records_alone(runs, tmp_path, capsys, monkeypatch):
    drawn = {name: FIGURES[name] for name in ("figA1", "epsilon")}  # each takes its second
    monkeypatch.setattr("advmoe.reports.write.FIGURES", drawn)
    out = tmp_path / "new/report"
    assert main(["report", str(runs), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    files = names(out)
    table = "ours-fashion-mnist-resnet18-w16-6_epochs"
    assert {f"tables/{name}.{suffix}" for name in ("table_a1", "table_a2", table) for suffix in ("md", "csv", "tex")} <= files
    assert {f"figures/{name}.{suffix}" for name in drawn for suffix in ("png", "pdf")} <= files
    assert figures_of(out / f"tables/{table}.csv")["AT (MoE)", "0.5"] == "43"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "One seed each, so not ranked by RA-worst: AT (Dense)" in page
    assert "Different batches for the two levels help" in page
    assert "One seed each, so not ranked by RA-worst: AT (Dense)" in captured.out
    assert "not shown    Different batches" in captured.out
    assert f"Written from 5 Records to {out}: report.html" in captured.out


def test_figures_without_data_are_skipped(tmp_path):
    write(tmp_path / "record.json", old_content("at_dense"))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert not {name for name in names(tmp_path / "out") if "figA1" in name or "figA2" in name}


def test_json_is_all_of_stdout(runs, tmp_path, capsys, quick):
    out = tmp_path / "out"
    assert main(["report", str(runs), "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["records"], set(result)) == (5, {"records", "verdict", "claims", "files"})
    assert {claim["verdict"] for claim in result["claims"]} <= {"supported", "contradicted", "not shown"}
    assert set(result["files"]) == names(out) - {".made.json"}


def test_bad_files_are_one_line_each_and_the_rest_is_made(runs, tmp_path, capsys, quick):
    write(runs / "broken/record.json", '{"schema": 2')
    write(runs / "newer.json", {**content(), "schema": 99})
    write(runs / "foreign.json", {"name": "a package"})
    write(runs / "old.json", old_content("at_sparse"))
    claimed = {**content(ra_worst=1.0), "time": "2020-01-01T00:00:00+00:00"}
    claimed["config"]["training"]["lr"] = 0.7
    write(runs / "claimed.json", claimed)
    assert main(["report", str(runs), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.splitlines()
    messages = ["broken/record.json: is not JSON", "newer.json: holds a Record of schema 99", "foreign.json: holds no Record"]
    messages.append("claimed.json: seed 0 of advmoe, r 0.5, N 2, resnet18, fashion-mnist: other settings")
    assert len(lines) == len(messages)
    for part in messages:
        (line,) = [line for line in lines if part in line]
        assert line.startswith("warning: left out, ")
    figures = figures_of(tmp_path / "out/tables/ours-fashion-mnist-resnet18-w16-6_epochs.csv")
    assert (figures["AT (Sparse)", "0.5"], figures["AdvMoE", "0.5"]) == ("45", "49.25")


@pytest.mark.parametrize("content", [None, "{", {"a": 1}])
def test_a_folder_without_records_is_refused_and_nothing_written(tmp_path, capsys, content):
    (tmp_path / "runs").mkdir()
    if content is not None:
        write(tmp_path / "runs/x.json", content)
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "holds no Record; advmoe evaluate RUN writes one" in captured.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_out_must_not_be_a_file(runs, tmp_path, capsys, path):
    (tmp_path / "file").write_text("mine")
    assert main(["report", str(runs), "--out", str(tmp_path / path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    reason = "is a file" if path == "file" else f"{tmp_path / 'file'} is a file"
    assert f"{tmp_path / path}: {reason}; --out takes a folder" in captured.err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_figure_that_fails_is_one_warning_and_the_rest_is_made(runs, tmp_path, capsys, monkeypatch):
    def draws(records, path):
        path.write_bytes(b"")
        return path.suffix == ".pdf"

    def fails(records, path):
        if path.suffix == ".pdf":
            raise ValueError("odd\nRecords")
        path.write_bytes(b"half")
        return True

    monkeypatch.setattr("advmoe.reports.write.FIGURES", {"load": fails, "epsilon": draws})
    out = tmp_path / "out"
    assert main(["report", str(runs), "--out", str(out)]) == 0
    assert capsys.readouterr().err == "warning: left out, figures/load: could not be drawn (ValueError: odd Records)\n"
    assert not list(out.glob("figures/load.*"))
    assert (out / "figures/epsilon.pdf").exists()
    assert "could not be drawn." in (out / "report.html").read_text(encoding="utf-8")


def test_garbled_records_are_one_line_each_and_the_rest_is_made(runs, tmp_path, capsys, quick):
    for name, changes in {"a": {"sa": float("nan")}, "b": {"gallery": [[]], "history": 7}, "c": {"ra_aa": {}}}.items():
        write(runs / f"{name}/record.json", content("at_small_dense", **changes))
    assert main(["report", str(runs), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("record.json: ")[2] for line in lines] == [
        "holds no Record (sa is nan, not a number from 0 to 100)",
        "read without its garbled parts: history, gallery",
        "holds no Record (ra_aa is {}, not a number from 0 to 100)",
    ]
    assert "AT (S-Dense)" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_an_interrupt_leaves_no_half_written_file(runs, tmp_path, monkeypatch, quick):
    out = tmp_path / "out"
    assert main(["report", str(runs), "--out", str(out)]) == 0
    before = {name: (out / name).read_bytes() for name in names(out)}
    write(runs / "more/record.json", content("at_small_dense"))

    def interrupted(records, path):
        with drafted(path) as draft:
            draft.write_bytes(b"half")
            raise KeyboardInterrupt

    monkeypatch.setattr("advmoe.reports.write.FIGURES", {"fig7": interrupted})
    assert main(["report", str(runs), "--out", str(out)]) == 130
    assert names(out) == set(before)
    assert (out / "report.html").read_bytes() == before["report.html"]
    changed = {name for name in before if (out / name).read_bytes() != before[name]}
    assert changed == {f"tables/ours-fashion-mnist-resnet18-w16-6_epochs.{suffix}" for suffix in ("md", "csv", "tex")}


def test_a_second_report_removes_the_files_of_the_first_and_no_others(runs, tmp_path, quick):
    out = tmp_path / "out"
    write(runs / "wide/record.json", content(dataset="other"))
    assert main(["report", str(runs), "--out", str(out)]) == 0
    (out / "tables/mine.md").write_text("mine")
    assert (out / "tables/ours-other-resnet18-w16-6_epochs.md").exists()
    (runs / "wide/record.json").unlink()
    files = json.loads((out / ".made.json").read_text())
    (tmp_path / "outside.md").write_text("mine")
    write(out / ".made.json", [*files, "../outside.md", "tables/../../outside.md", 7])
    assert main(["report", str(runs), "--out", str(out)]) == 0
    assert not list(out.glob("tables/ours-other*"))
    assert (out / "tables/mine.md").exists()
    assert (tmp_path / "outside.md").exists()


@pytest.mark.parametrize("text", ["{", "7", "[" * 100_000], ids=["cut", "number", "nested"])
def test_a_damaged_list_of_an_earlier_report_is_replaced(runs, tmp_path, quick, text):
    out = tmp_path / "out"
    assert main(["report", str(runs), "--out", str(out)]) == 0
    written = (out / ".made.json").read_text()
    (out / ".made.json").write_text(text)
    assert main(["report", str(runs), "--out", str(out)]) == 0
    assert (out / ".made.json").read_text() == written


def test_a_second_report_to_the_same_folder_waits_for_the_first(runs, tmp_path, monkeypatch):
    out, threads = tmp_path / "out", []
    write(tmp_path / "others/record.json", content(dataset="other"))

    def start_a_second_report(records, path):
        if not threads:
            threads.append(threading.Thread(target=main, args=(["report", str(tmp_path / "others"), "--out", str(out)],)))
            threads[0].start()
            threads[0].join(1)
        return False

    monkeypatch.setattr("advmoe.reports.write.FIGURES", {"fig7": start_a_second_report})
    assert main(["report", str(runs), "--out", str(out)]) == 0
    threads[0].join()
    assert names(out) - {".made.json"} == set(json.loads((out / ".made.json").read_text()))
    assert list(out.glob("tables/ours-other*"))
    assert not list(out.glob("tables/ours-fashion-mnist*"))


def test_the_same_records_give_the_same_tables_and_a_report_below_them_is_not_read(runs, capsys, quick):
    """The report's folder lies among the runs."""
    out = runs / "report"
    assert main(["report", str(runs), "--out", str(out)]) == 0
    before = {name: (out / name).read_bytes() for name in names(out)}
    assert main(["report", str(runs), "--out", str(out)]) == 0
    assert capsys.readouterr().err == ""
    assert {name: (out / name).read_bytes() for name in names(out)} == before


def test_names_from_data_cannot_break_out_of_a_table(tmp_path, quick):
    write(tmp_path / "record.json", content(dataset="a|b & <script>alert(1)</script> 50% $x_1"))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    (tex,) = (tmp_path / "out/tables").glob("ours-*.tex")
    assert r"a\textbar{}b \& \textless{}script\textgreater{}" in tex.read_text()
    assert "<script>alert" not in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    (text,) = (tmp_path / "out/tables").glob("ours-*.md")
    assert r"a\|b & \<script\>" in text.read_text()


def test_names_from_data_cannot_drive_the_terminal(tmp_path, capsys, quick):
    write(tmp_path / "record.json", content(dataset="a\x1b[31mb"))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert r"a\x1b[31mb" in output


def test_the_schema_of_records_is_printed(capsys):
    assert main(["report", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["schema"] == {"const": 3, "default": 3, "title": "Schema", "type": "integer"}
    assert main(["report", "--schema", "here"]) == 2
    assert capsys.readouterr().err == "advmoe: error: --schema takes no other argument: advmoe report --schema\n"

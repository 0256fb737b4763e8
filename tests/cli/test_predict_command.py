"""`advmoe predict`, with files of every kind."""

import csv
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_backbone import ROUTED

from advmoe import load
from advmoe.cli.main import main
from advmoe.runs import predict
from advmoe.training.checkpoint import RunFolder
from advmoe.training.manifest import Progress
from advmoe.training.start import network


@pytest.fixture(scope="module")
def run(tiny: Any, splits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an untrained network."""
    path, config = tmp_path_factory.mktemp("runs") / "run", tiny()
    folder = RunFolder(path)
    folder.claim(config, resume=False)
    row = {"epoch": 1, "phase": 1, "score": 1.0, "train_seconds": 1.0}
    folder.save(network(config, splits.spec).state_dict(), {}, Progress([row]), "f" * 64, splits.spec)
    return path


@pytest.fixture
def images(tmp_path: Path, splits: Any) -> Path:
    """Ten test images, the last three in a folder of the folder."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number, image in enumerate(splits.test.raw[:10, 0].numpy()):
        Image.fromarray(image).save(folder / ("sub" if number > 6 else "") / f"{number}.png")
    return folder


def run_predict(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["predict", *map(str, arguments), "--device", "cpu"]) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_classes_confidences_and_pathways_are_the_networks(run: Path, images: Path, splits: Any, capsys: Any) -> None:
    out, err = run_predict(capsys, run, images, "--json", "--batch-size", 4)
    rows, model = json.loads(out), load(run)
    assert err == ""
    assert [Path(row["image"]).stem for row in rows] == [str(number) for number in range(10)]
    with torch.inference_mode():
        logits, routings = model.forward_routed(splits.test.pixels()[:10])
    assert [row["class"] for row in rows] == [model.classes[number] for number in logits.argmax(dim=1).tolist()]
    assert [row["confidence"] for row in rows] == pytest.approx(logits.softmax(dim=1).amax(dim=1).tolist(), rel=1e-4)
    assert [row["pathway"] for row in rows] == torch.stack([routing.experts for routing in routings], dim=1).tolist()


def test_csv_and_table_say_the_same(run: Path, images: Path, capsys: Any) -> None:
    rows = list(csv.DictReader(io.StringIO(run_predict(capsys, run, images, "--csv")[0])))
    lines = run_predict(capsys, run, images)[0].splitlines()
    assert len(rows) == len(lines) - 1 == 10
    assert lines[0].split() == ["class", "confidence", "pathway", "image"]
    for row, line in zip(rows, lines[1:], strict=True):
        assert line.startswith(row["class"])
        assert f"{float(row['confidence']):.4f}  {row['pathway']}  {row['image']}" in line
        assert row["pathway"].count("-") == ROUTED - 1


def test_csv_has_names_unchanged(run: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "narrow\u202fspace, and\nline.png"
    shutil.copy(images / "1.png", path)
    (row,) = csv.DictReader(io.StringIO(run_predict(capsys, run, path, "--csv")[0]))
    assert row["image"] == str(path)


def test_files_without_an_image_are_named_and_the_rest_continues(run: Path, images: Path, capsys: Any) -> None:
    (images / "1.png").write_bytes(b"")
    (images / "a\x1b[2J.txt").write_text("hello")
    (images / "sub/loop").symlink_to(images)
    Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save(images / "z.jpg")
    out, err = run_predict(capsys, run, images, images / "gone.png", "--batch-size", 3, status=2)
    assert len(out.splitlines()) == 1 + 9 + 1
    assert out.splitlines()[-1].endswith("z.jpg  (resized from 40 x 50; colours dropped)")
    assert len(err.splitlines()) == 5
    assert err.splitlines()[-1] == f"advmoe: error: {images / 'gone.png'}: 1 of 2 given paths could not be read"
    for name in ("1.png: is empty", "txt: not an image", "loop: a link to a folder that contains it", "gone.png: cannot be read"):
        assert name in err
    assert "\x1b" not in err


def test_links_to_folders_are_followed_and_folders_that_cannot_be_read_are_named(
    run: Path, images: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(images / "sub")
    (tmp_path / "link2").symlink_to(tmp_path / "missing")
    (tmp_path / "shut").mkdir()
    listdir = os.listdir

    def refuse(folder: Path) -> list[str]:
        if folder.name == "shut":
            raise PermissionError(13, "Permission denied", str(folder))
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    out, err = run_predict(capsys, run, tmp_path, "--csv")
    assert len(out.splitlines()) == 1 + 10 + 3
    assert f"{tmp_path}/link/9.png" in out
    assert err.splitlines() == [
        f"advmoe: {tmp_path}/link2: cannot be read (No such file or directory)",
        f"advmoe: {tmp_path}/shut: cannot be read (Permission denied)",
    ]


def test_a_folder_that_may_be_listed_but_not_entered_is_named(
    run: Path, images: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = os.stat

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{images}/sub/"):
            raise PermissionError(13, "Permission denied", str(path))
        return status(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    out, err = run_predict(capsys, run, images, "--json")
    assert len(json.loads(out)) == 7
    assert err.splitlines() == [f"advmoe: {images}/sub/{number}.png: cannot be read (Permission denied)" for number in (7, 8, 9)]
    assert "7.png: cannot be read (Permission denied)" in run_predict(capsys, run, images / "sub/7.png", status=2)[1]


def test_links_in_a_circle_end(run: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    Image.new("L", (28, 28)).save(tmp_path / "a/b/x.png")
    out, err = run_predict(capsys, run, tmp_path, "--csv")
    assert len(out.splitlines()) == 2
    assert err == f"advmoe: {tmp_path}/a/b/up: a link to a folder that contains it ({tmp_path / 'a'}); not followed\n"


@pytest.mark.parametrize("form", ["--json", "--csv", ""])
def test_nothing_to_classify_is_one_line_and_status_2(run: Path, tmp_path: Path, capsys: Any, form: str) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    out, err = run_predict(capsys, run, tmp_path / "empty.png", *form.split(), status=2)
    assert (out, err) == ("", f"advmoe: error: {tmp_path / 'empty.png'}: is empty\n")
    (tmp_path / "folder").mkdir()
    assert run_predict(capsys, run, tmp_path / "folder", *form.split(), status=2) == (
        "",
        f"advmoe: error: {tmp_path / 'folder'}: contains no file\n",
    )
    out, err = run_predict(capsys, run, tmp_path, *form.split(), status=2)
    assert out == ""
    assert err.splitlines()[-1] == f"advmoe: error: {tmp_path}: none of 1 file could be read as an image"


def test_no_more_than_a_batch_is_in_memory(run: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = load(run), []
    monkeypatch.setattr(model, "predict_batch", lambda x: sizes.append(len(x)) or [("x", 0.5, ())] * len(x))
    paths = predict.images_in([images])
    predictions = predict.predict(model, paths, 4)
    next(predictions)
    assert sizes == [4]
    assert sum(1 for _ in paths) == 6  # the folder was read no further than that
    assert len(list(predictions)) == 3


def test_dense_networks_have_no_pathway(tiny: Any, splits: Any, tmp_path: Path, images: Path, capsys: Any) -> None:
    config, folder = tiny("at_dense"), RunFolder(tmp_path / "dense")
    folder.claim(config, resume=False)
    row = {"epoch": 1, "phase": 1, "score": 1.0, "train_seconds": 1.0}
    folder.save(network(config, splits.spec).state_dict(), {}, Progress([row]), "f" * 64, splits.spec)
    assert json.loads(run_predict(capsys, folder.path, images / "0.png", "--json")[0])[0]["pathway"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere", "x.png"],
            "nowhere: no run's folder, no file, no name on the hub (owner/name), and no network of",
        ),
        (["RUN"], "give one or more IMAGES"),
        (["RUN", "x.png", "--json", "--csv"], "give --json or --csv, not both"),
        (["RUN", "x.png", "--batch-size", "0"], "batch_size must be at least 1, not 0"),
    ],
)
def test_bad_input_is_one_line(run: Path, arguments: list[str], message: str, capsys: Any) -> None:
    out, err = run_predict(capsys, *(run if argument == "RUN" else argument for argument in arguments), status=2)
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


# Values that are too large, and devices without values


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "99999999999999999999999"], "batch_size must be less than 2**31, not 99999999999999999999999"),
        (["--threads", "100000"], "threads must be in [0, 1024], not 100000"),
        (["--threads", "10000000000"], "threads must be in [0, 1024], not 10000000000"),
        (["--device", "meta"], "device 'meta' is not available here: "),
    ],
)
def test_a_value_that_torch_cannot_use_is_one_line(run: Path, images: Path, flags: list[str], message: str, capsys: Any) -> None:
    assert main(["predict", str(run), str(images), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"advmoe: error: {message}")
    assert (captured.out, captured.err.count("\n")) == ("", 1)

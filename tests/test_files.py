import os
from fnmatch import fnmatch
from pathlib import Path

import pytest

from advmoe.config import CONFIG_FILE
from advmoe.errors import UserError
from advmoe.evaluation.record_file import GALLERY, RECORD
from advmoe.evaluation.store import STORE
from advmoe.files import (
    FOLDERS_OF_RUN,
    OF_RUN,
    bounded_text,
    check_folder,
    check_target,
    check_utf8,
    drafted,
    json_object,
    walk,
    write_atomically,
    write_json,
)
from advmoe.training.checkpoint import METRICS, RunFolder
from advmoe.training.manifest import WEIGHTS


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail() -> None:
        with drafted(path) as draft:
            draft.write_text("half of the new text")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_names_the_file_and_not_its_draft(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "file"
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(path, "text")
    assert caught.value.filename == str(path)


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_target(tmp_path / "image.png", "the image")
    with pytest.raises(UserError, match=f"{tmp_path}: is a folder; the image must go to a file"):
        check_target(tmp_path, "the image")
    with pytest.raises(UserError, match="missing: no such folder for the image"):
        check_target(tmp_path / "missing" / "image.png", "the image")
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))  # root may write anywhere
    with pytest.raises(UserError, match=f"{tmp_path}: the image cannot be written to this folder"):
        check_target(tmp_path / "image.png", "the image")


def test_a_folder_that_can_be_neither_written_nor_created_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(tmp_path, "the run")
    check_folder(tmp_path / "new/run", "the run")
    (tmp_path / "file").touch()
    check_folder(tmp_path / "file", "the run")  # the run's folder says what is wrong with it
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))  # root may write anywhere
    for folder in (tmp_path, tmp_path / "new/run"):
        with pytest.raises(UserError, match=f"^{tmp_path}: the run cannot be written to this folder$"):
            check_folder(folder, "the run")


def test_a_file_is_replaced_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with drafted(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_file_do_not_share_a_draft(tmp_path: Path) -> None:
    """Processes in two containers may have the same number, so the number is no name."""
    path = tmp_path / "file"
    with drafted(path) as first, drafted(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["[1]", "3", "{", "[" * 100_000, '{"a": 1', ""])
def test_a_file_without_a_json_object_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    assert json_object(tmp_path / "file") is None


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert json_object(tmp_path / "file") is None
    write_json(tmp_path / "file", {"a": [1, None, "é"]})
    assert json_object(tmp_path / "file") == {"a": [1, None, "é"]}
    assert json_object(tmp_path) is None


def test_only_plain_files_up_to_the_limit_are_read(tmp_path: Path) -> None:
    path, pipe = tmp_path / "file", tmp_path / "pipe"
    path.write_text("four")
    os.mkfifo(pipe)
    assert bounded_text(path, 4) == "four"
    with pytest.raises(UserError, match="file: has 4 bytes; at most 3 are read"):
        bounded_text(path, 3)
    with pytest.raises(UserError, match="pipe: not a plain file"):
        bounded_text(pipe, 4)
    with pytest.raises(FileNotFoundError):
        bounded_text(tmp_path / "missing", 4)
    with pytest.raises(IsADirectoryError):
        bounded_text(tmp_path, 2**20)


def test_a_path_that_is_not_utf_8_is_refused() -> None:
    check_utf8(Path("né"))
    with pytest.raises(UserError, match=r"^n\\udce9: the path must be UTF-8 text; give another name$"):
        check_utf8(Path("n\udce9"))


# Targets that are links, pipes, or files that the network comes from


def test_the_file_that_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    for text in ("new", "newer"):  # at first the link leads nowhere
        check_target(tmp_path / "link", "the text")
        write_atomically(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "folder" / "file").read_text() == text


def test_a_pipe_or_a_device_is_no_target(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(UserError, match=f"^{path}: is a pipe or a device; the text must go to a file$"):
            check_target(path, "the text")


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "metrics.jsonl", "record.json", "few.record.json", "gallery.json", "checkpoints/epoch-1/weights", "link"],
)
def test_a_file_of_the_run_is_no_target(tmp_path: Path, name: str) -> None:
    (tmp_path / "checkpoints" / "epoch-1").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "config.yaml")
    for other in ("net.onnx", "evaluation.png", "checkpoints.onnx"):
        check_target(tmp_path / other, "the network", tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path / name}: the network could replace a file of {tmp_path}; give another name$"):
        check_target(tmp_path / name, "the network", tmp_path / "other", tmp_path)


def test_an_input_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "net")
    with pytest.raises(UserError, match=f"^{tmp_path / 'link'}: the text could replace {tmp_path / 'net'}; give another name$"):
        check_target(tmp_path / "link", "the text", tmp_path / "net")


def test_every_file_of_a_run_is_protected() -> None:
    """`advmoe.files` imports no other module, so it repeats their names."""
    names = [CONFIG_FILE, METRICS, RECORD, GALLERY, WEIGHTS, f"standard.{RECORD}"]
    assert [name for name in names if not any(fnmatch(name, pattern) for pattern in OF_RUN)] == []
    folders = [STORE, f"{STORE}-standard", RunFolder(Path()).checkpoint_path.name]
    assert [name for name in folders if not any(fnmatch(name, pattern) for pattern in FOLDERS_OF_RUN)] == []


def test_a_folder_that_cannot_be_read_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / ("x" * 300)  # unlike permissions, this holds for root too
    assert list(walk(folder)) == []
    assert caplog.messages == [f"left out, {folder}: cannot be read (File name too long)"]


def test_links_to_folders_are_followed_and_each_folder_comes_once(tmp_path: Path) -> None:
    elsewhere, runs = tmp_path / "elsewhere", tmp_path / "runs"
    for folder in (elsewhere / "c", runs / "b", runs / "a"):
        folder.mkdir(parents=True)
    (runs / "linked").symlink_to(elsewhere)
    (runs / "a" / "up").symlink_to(runs)  # a circle
    (runs / "b2").symlink_to(runs / "b")
    assert [str(Path(parent).relative_to(runs)) for parent, _, _ in walk(runs)] == [".", "a", "b", "linked", "linked/c"]

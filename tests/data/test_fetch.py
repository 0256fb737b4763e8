"""Downloads from a local server that ignores ranges, breaks the connection, or sends something else."""

import functools
import hashlib
import http.server
import io
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusal import refusal
from rich.console import Console

from advmoe.data import fetch as module
from advmoe.data.fetch import OFFICIAL, Official, fetch

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


@dataclass
class Server:
    """What the server sends and how, and the requests it got."""

    address: str = ""
    content: bytes = CONTENT
    ranges: bool = True
    status: int = 200
    cuts: list[int] = field(default_factory=list)  # bytes after which each of the next connections breaks off
    shift: int = 0  # added to where a range starts
    length: bool = True  # say how long the answer is
    answer: threading.Event = field(default_factory=threading.Event)  # a silent server sends nothing before it is set
    silent: bool = False
    requested: list[str | None] = field(default_factory=list)  # the Range header of each request


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one file as its Server says."""

    def __init__(self, *arguments: Any, server_state: Server) -> None:
        self.state = server_state
        super().__init__(*arguments)

    def do_GET(self) -> None:
        state, requested = self.state, self.headers.get("Range")
        state.requested.append(requested)
        if state.silent:
            state.answer.wait()
            return
        if state.status != 200:
            self.send_error(state.status)
            return
        start = int(requested[len("bytes=") : -1]) if requested and state.ranges else 0
        if start and start >= len(state.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(state.content)}")
            self.end_headers()
            return
        self._answer(start, requested is not None and state.ranges)

    def _answer(self, start: int, partial: bool) -> None:
        state = self.state
        body = state.content[start:]
        self.send_response(206 if partial else 200)
        if partial:
            size = len(state.content)
            self.send_header("Content-Range", f"bytes {start + state.shift}-{size - 1}/{size}")
        if state.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: state.cuts.pop(0)] if state.cuts else body)

    def log_message(self, *_: Any) -> None:
        """No log."""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, server_state=state)) as running:
        state.address = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield state
        state.answer.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def official_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server as the official one for cifar10 (with a checksum) and tinyimagenet (a zip without one)."""
    monkeypatch.setitem(OFFICIAL, "cifar10", Official(f"{server.address}/set.tar.gz", MD5))
    monkeypatch.setitem(OFFICIAL, "tinyimagenet", Official(f"{server.address}/tiny.zip", folder="tiny"))
    return server


def get(to: Path, name: str = "cifar10") -> str:
    return "\n".join(fetch(name, to, Console(quiet=True)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tiny_zip(content: bytes = b"n01443537\n") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiny/wnids.txt", content)
    return buffer.getvalue()


# What the table says


def test_published_checksums_are_those_of_the_official_page() -> None:
    """https://www.cs.toronto.edu/~kriz/cifar.html"""
    assert OFFICIAL["cifar10"].md5 == "c58f30108f718f92721af3b95e74349a"
    assert OFFICIAL["cifar100"].md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    assert OFFICIAL["tinyimagenet"].md5 is None
    files = [official.file for official in OFFICIAL.values()]
    assert files == ["cifar-10-python.tar.gz", "cifar-100-python.tar.gz", "tiny-imagenet-200.zip"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagenet", "cannot be downloaded without an account: register at https://image-net.org"),
        ("fashion-mnist", "comes with the package"),
        ("folder", "a folder of your images"),
        ("cifar", "unknown dataset to download 'cifar': did you mean cifar10"),
    ],
)
def test_what_cannot_be_downloaded_says_why(name: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(get, tmp_path / "data", name)
    assert names(tmp_path) == []


# The download


def test_file_arrives_complete(official_server: Server, tmp_path: Path) -> None:
    output = get(tmp_path / "data" / "cifar10")
    assert f"MD5 {MD5}, as published" in output
    assert (tmp_path / "data/cifar10/set.tar.gz").read_bytes() == CONTENT
    assert names(tmp_path / "data/cifar10") == ["set.tar.gz"]
    assert official_server.requested == [None]


def test_file_that_exists_is_verified_not_downloaded(official_server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz").write_bytes(CONTENT)
    assert "as published" in get(tmp_path)
    assert official_server.requested == []


def test_wrong_file_that_exists_is_named_and_kept(official_server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz").write_bytes(b"other")
    digest = hashlib.md5(b"other", usedforsecurity=False).hexdigest()
    text = refusal(get, tmp_path)
    assert f"set.tar.gz: is not the official set.tar.gz: MD5 {digest}, expected {MD5}" in text
    assert (tmp_path / "set.tar.gz").read_bytes() == b"other"
    assert official_server.requested == []


def test_a_second_download_of_a_file_is_refused(official_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would write to the same .part."""
    receive = module._receive

    def receive_while_another_process_starts(*arguments: Any) -> None:
        monkeypatch.setattr(module, "_receive", receive)
        message = refusal(get, tmp_path)
        assert re.search(r"/set.tar.gz: process \d+ on \S+ is already downloading this file; wait for it to finish$", message)
        receive(*arguments)

    monkeypatch.setattr(module, "_receive", receive_while_another_process_starts)
    get(tmp_path)
    assert (tmp_path / "set.tar.gz").read_bytes() == CONTENT
    assert names(tmp_path) == ["set.tar.gz"]
    assert official_server.requested == [None]


def test_part_is_resumed(official_server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz.part").write_bytes(CONTENT[:100_000])
    get(tmp_path)
    assert (tmp_path / "set.tar.gz").read_bytes() == CONTENT
    assert names(tmp_path) == ["set.tar.gz"]
    assert official_server.requested == ["bytes=100000-"]


def test_a_server_that_ignores_ranges_sends_the_complete_file(official_server: Server, tmp_path: Path) -> None:
    official_server.ranges = False
    (tmp_path / "set.tar.gz.part").write_bytes(b"rubbish")
    get(tmp_path)
    assert (tmp_path / "set.tar.gz").read_bytes() == CONTENT
    assert official_server.requested == ["bytes=7-"]


def test_complete_part_needs_no_more(official_server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz.part").write_bytes(CONTENT)
    get(tmp_path)
    assert names(tmp_path) == ["set.tar.gz"]
    assert official_server.requested == ["bytes=300000-"]


def test_part_longer_than_the_file_is_downloaded_again(official_server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz.part").write_bytes(CONTENT + b"more")
    get(tmp_path)
    assert (tmp_path / "set.tar.gz").read_bytes() == CONTENT
    assert official_server.requested == ["bytes=300004-", None]


def test_other_range_than_requested_is_refused(official_server: Server, tmp_path: Path) -> None:
    official_server.shift = -5
    (tmp_path / "set.tar.gz.part").write_bytes(CONTENT[:100])
    assert "another range than requested" in refusal(get, tmp_path)
    assert (tmp_path / "set.tar.gz.part").read_bytes() == CONTENT[:100]


def test_a_broken_connection_is_resumed(official_server: Server, tmp_path: Path) -> None:
    official_server.cuts = [120_000, 60_000]
    get(tmp_path)
    assert (tmp_path / "set.tar.gz").read_bytes() == CONTENT
    assert official_server.requested == [None, "bytes=120000-", "bytes=180000-"]


def test_a_connection_without_progress_is_an_error_and_the_part_is_kept(official_server: Server, tmp_path: Path) -> None:
    official_server.cuts = [120_000, 0]
    text = refusal(get, tmp_path)
    assert f"cannot download {official_server.address}/set.tar.gz (connection lost after 120000 of 300000 bytes)" in text
    assert f"download it by other means and save it as {tmp_path}/set.tar.gz; 120000 bytes are kept" in text
    assert names(tmp_path) == ["set.tar.gz.part"]
    get(tmp_path)
    assert (tmp_path / "set.tar.gz").read_bytes() == CONTENT


def test_a_download_of_unknown_length_is_judged_by_its_checksum(official_server: Server, tmp_path: Path) -> None:
    official_server.length, official_server.cuts = False, [299_999]
    assert "MD5" in refusal(get, tmp_path)
    assert names(tmp_path) == ["set.tar.gz.bad"]


def test_wrong_bytes_never_get_the_right_name(official_server: Server, tmp_path: Path) -> None:
    official_server.content = b"<html>please log in</html>"
    text = refusal(get, tmp_path)
    assert re.search(rf"MD5 [0-9a-f]{{32}}, expected {MD5}; http\S+ is saved as .+/set.tar.gz.bad", text)
    assert names(tmp_path) == ["set.tar.gz.bad"]
    official_server.content = CONTENT
    get(tmp_path)
    assert names(tmp_path) == ["set.tar.gz", "set.tar.gz.bad"]
    assert official_server.requested == [None, None]


@pytest.mark.parametrize("status", [403, 404, 503])
def test_refusal_is_one_line(status: int, official_server: Server, tmp_path: Path) -> None:
    official_server.status = status
    assert f"(HTTP {status} " in refusal(get, tmp_path)
    assert names(tmp_path) == []


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OFFICIAL, "cifar10", Official("http://127.0.0.1:9/set.tar.gz", MD5))
    text = refusal(get, tmp_path)
    assert "cannot download http://127.0.0.1:9/set.tar.gz (" in text
    assert text.endswith(f": download it by other means and save it as {tmp_path}/set.tar.gz")


def test_silent_server_runs_into_the_timeout(official_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official_server.silent = True
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    assert "timed out" in refusal(get, tmp_path)


def test_interrupt_keeps_the_part(official_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = []

    def interrupted(*_: Any, **fields: Any) -> None:
        updates.append(fields)
        if len(updates) == 2:  # the first chunk has come
            raise KeyboardInterrupt

    monkeypatch.setattr("advmoe.data.fetch.Progress.update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "set.tar.gz.part").read_bytes() == CONTENT[: module.CHUNK]


# Without a published checksum


def test_the_checksum_of_a_zip_is_recorded(official_server: Server, tmp_path: Path) -> None:
    official_server.content = tiny_zip()
    digest = hashlib.sha256(official_server.content).hexdigest()
    assert get(tmp_path, "tinyimagenet").splitlines() == [
        f"{tmp_path}/tiny.zip: downloaded", f"tiny.zip: SHA256 {digest}, recorded now: none is published",
    ]  # fmt: skip
    assert names(tmp_path) == ["tiny.zip", "tiny.zip.sha256"]
    assert (tmp_path / "tiny.zip.sha256").read_text() == f"{digest}  tiny.zip\n"
    assert "as recorded at first use" in get(tmp_path, "tinyimagenet")
    assert len(official_server.requested) == 1


def test_the_checksum_of_a_zip_that_the_user_saved_is_recorded(official_server: Server, tmp_path: Path) -> None:
    (tmp_path / "tiny.zip").write_bytes(tiny_zip())
    get(tmp_path, "tinyimagenet")
    assert names(tmp_path) == ["tiny.zip", "tiny.zip.sha256"]
    assert official_server.requested == []


def test_an_unpacked_folder_needs_no_download(official_server: Server, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    assert "already exists" in get(tmp_path, "tinyimagenet")
    assert official_server.requested == []


def test_other_archive_than_at_first_use_is_refused(official_server: Server, tmp_path: Path) -> None:
    official_server.content = tiny_zip()
    get(tmp_path, "tinyimagenet")
    (tmp_path / "tiny.zip").write_bytes(tiny_zip(b"other"))
    assert f"expected {hashlib.sha256(official_server.content).hexdigest()}" in refusal(get, tmp_path, "tinyimagenet")
    (tmp_path / "tiny.zip").unlink()
    official_server.content = tiny_zip(b"other")
    assert "tiny.zip.bad" in refusal(get, tmp_path, "tinyimagenet")
    assert names(tmp_path) == ["tiny.zip.bad", "tiny.zip.sha256"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html></html>", "tiny.zip.part: damaged or incomplete zip archive"),
        (tiny_zip()[:-30], "tiny.zip.part: damaged or incomplete zip archive"),
        (tiny_zip().replace(b"n01443537", b"n01443536"), "tiny.zip.part/tiny/wnids.txt: damaged in the archive (Bad CRC-32"),
    ],
)
def test_damaged_archive_is_not_recorded(content: bytes, message: str, official_server: Server, tmp_path: Path) -> None:
    official_server.content = content
    assert message in refusal(get, tmp_path, "tinyimagenet")
    assert names(tmp_path) == ["tiny.zip.bad"]


def test_a_damaged_checksum_file_is_refused_before_the_download(official_server: Server, tmp_path: Path) -> None:
    (tmp_path / "tiny.zip.sha256").write_text("rubbish\n")
    assert "tiny.zip.sha256: contains no SHA-256" in refusal(get, tmp_path, "tinyimagenet")
    assert official_server.requested == []

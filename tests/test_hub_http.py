"""The Hugging Face hub's library with a local server that answers like the hub."""

import hashlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from refusal import refusal

import advmoe
from advmoe.runs.load import FILE
from advmoe.training.checkpoint import RunFolder
from advmoe.training.manifest import Progress
from advmoe.training.start import network

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="the extra hub is not installed: pip install 'advmoe[hub]'"
)
NAME, COMMIT = "someone/robust", "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Serves only /OWNER/NAME/resolve/REVISION/FILE, with the hub's headers."""

    files: dict[str, bytes]
    requests: list[tuple[str, str]]

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.wfile.write(self.respond())

    def respond(self) -> bytes:
        """Send status and headers; return the body."""
        self.requests.append((self.command, self.path))
        parts = self.path.split("?")[0].strip("/").split("/")
        owner, name, _, revision, file = parts if len(parts) == 5 else ("", "", "", "", "")
        code = "RepoNotFound" if f"{owner}/{name}" != NAME else "RevisionNotFound" if revision not in ("main", COMMIT) else ""
        body = self.files.get(file)
        if code or body is None:
            self.send_response(401 if code == "RepoNotFound" else 404)
            self.send_header("X-Error-Code", code or "EntryNotFound")
            body = b""
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, *_: Any) -> None:
        """No log."""


def unload_library() -> None:
    """Remove the library's modules, so that the next import reads its environment."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A running hub without files, and the library set to use it."""
    handler = type("HubHandler", (Handler,), {"files": {}, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    unload_library()
    yield server
    unload_library()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def published(hub: Any, tiny: Any, splits: Any, tmp_path: Path) -> advmoe.runs.load.Loaded:
    """A network on the hub."""
    folder, config = RunFolder(tmp_path / "run"), tiny()
    folder.claim(config, resume=False)
    row = {"epoch": 1, "phase": 1, "score": 1.0, "train_seconds": 1.0}
    folder.save(network(config, splits.spec).state_dict(), {}, Progress([row]), "f" * 64, splits.spec)
    model = advmoe.load(folder.path)
    advmoe.save_file(model, tmp_path / FILE)
    hub.RequestHandlerClass.files[FILE] = (tmp_path / FILE).read_bytes()
    return model


def test_a_network_comes_over_http_and_then_from_the_cache(hub: Any, published: Any) -> None:
    pixels = torch.rand(3, *published.input_size)
    requests = hub.RequestHandlerClass.requests
    for model in (advmoe.from_pretrained(NAME), advmoe.load(NAME), advmoe.from_pretrained(NAME, revision=COMMIT)):
        assert (model.classes, model.config.model) == (published.classes, published.config.model)
        with torch.inference_mode():
            assert torch.equal(model(pixels), published(pixels))
    assert [path for method, path in requests if method == "GET" and "/resolve/" in path] == [f"/{NAME}/resolve/main/{FILE}"]
    hub.shutdown()
    hub.server_close()
    assert advmoe.load(NAME).classes == published.classes  # from the cache, without the server


def test_what_the_hub_does_not_have_is_one_line(hub: Any, published: Any) -> None:
    unknown = "no such file or folder, and it cannot be downloaded from the hub"
    assert refusal(advmoe.from_pretrained, "someone/typo").startswith(
        f"someone/typo: {unknown} (the hub has no repository of that name, or it is private"
    )
    assert refusal(advmoe.from_pretrained, NAME, revision="v9") == f"{NAME}: {unknown} (the repository has no such revision)"
    hub.RequestHandlerClass.files.clear()
    hub.RequestHandlerClass.files["other.bin"] = b"x"
    assert "but has no such file: it contains no network of advmoe" in refusal(advmoe.from_pretrained, NAME)


def test_a_hub_that_is_down_is_one_line(hub: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("the library tries again, for 23 seconds in all"))
    hub.shutdown()
    hub.server_close()
    reason = "(the hub cannot be reached, or HF_HUB_OFFLINE is set, and the network is not in the local cache)"
    assert reason in refusal(advmoe.from_pretrained, NAME)
    assert capfd.readouterr().err == ""  # the library prints nothing for each try


def test_other_bytes_than_a_network_are_one_line(hub: Any) -> None:
    hub.RequestHandlerClass.files[FILE] = b"something else"
    assert "not a safetensors file" in refusal(advmoe.from_pretrained, NAME)

"""Damaged checkpoints, and hostile ones with valid checksums."""

import contextlib
import hashlib
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from damage_bytes import damaged, odd_numbers, odd_texts, odd_trees
from driver import counts, drive, read
from hypothesis import strategies as st
from test_fuzz_cifar import programs
from torch import nn

from advmoe.config import ModelConfig, RunConfig, to_dict
from advmoe.data import ImageSpec
from advmoe.errors import UserError
from advmoe.runs.load import load
from advmoe.training.checkpoint import Checkpoint, RunFolder, load_weights
from advmoe.training.manifest import Progress
from advmoe.training.start import network

with contextlib.suppress(UserError):
    load("no such network")  # sets the allocator, once in a process, before anything is watched

NAMES = ("model.safetensors", "optimizers.pt")
SPEC = ImageSpec(("cat", "dog"), (3, 32, 32), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
HISTORY = [{"epoch": 1, "phase": 1, "score": 1.0, "train_seconds": 1.0}]


def folder_of(path: Path) -> dict[str, bytes]:
    """The files of a tiny valid checkpoint."""
    run, model = RunFolder(path), nn.Linear(2, 1)
    run.claim(RunConfig(), resume=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    run.save(model.state_dict(), {"all": optimizer.state_dict()}, Progress(HISTORY), "f" * 64, SPEC)
    return {file.name: file.read_bytes() for file in run.checkpoint_folders()[0].iterdir()}


def sealed(manifest: Any, files: dict[str, bytes]) -> bytes:
    """The manifest with the checksums of the files (if it has none) and of itself."""
    if isinstance(manifest, dict):
        manifest.setdefault("sha256", {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())})
        manifest["seal"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps(manifest).encode()


def manifests() -> st.SearchStrategy[Any]:
    """Manifests with some odd fields; most leave their checksums to `sealed`."""
    usual = {
        "schema": 1,
        "epoch": 1,
        "fingerprint": "f" * 64,
        "history": HISTORY,
        "spec": {
            "classes": ["cat", "dog"],
            "shape": [3, 32, 32],
            "mean": [0.5] * 3,
            "std": [0.2] * 3,
        },
    }
    odd = st.one_of(odd_trees(), st.lists(st.fixed_dictionaries({"phase": odd_trees(), "score": odd_trees()}), max_size=3))
    spec = st.fixed_dictionaries(
        {name: st.one_of(st.just(value), st.lists(odd_numbers(), max_size=4), odd_trees()) for name, value in usual["spec"].items()}
    )  # type: ignore[attr-defined]
    sums = st.dictionaries(
        st.sampled_from(["/dev/zero", "../../config.yaml", "model.safetensors", "", "\0", "."]), odd_texts(), max_size=2
    )
    changes = st.one_of(
        st.dictionaries(st.sampled_from(list(usual)), odd, min_size=1, max_size=2),
        st.fixed_dictionaries({"spec": spec}),
        st.fixed_dictionaries({"sha256": st.one_of(sums, odd_trees())}),
    )
    return st.one_of(changes.map(lambda changed: usual | changed), odd_trees())


def safetensors() -> st.SearchStrategy[bytes]:
    """Files with odd headers."""
    entry = st.fixed_dictionaries(
        {
            "dtype": st.one_of(
                st.sampled_from(["F32", "F64", "I64", "BOOL", "F8_E4M3", "F4", "C64", "U16", "BF16", "X"]), odd_texts()
            ),
            "shape": st.one_of(st.lists(st.sampled_from([0, 1, 2, 2**31, 2**62, -1, 2**64]), max_size=3), odd_trees()),
            "data_offsets": st.one_of(st.sampled_from([[0, 8], [0, 0], [8, 4], [0, 2**63], [4, 12], [0, 4]]), odd_trees()),
        }
    )
    headers = st.dictionaries(st.sampled_from(["weight", "bias", "x", "__metadata__"]), st.one_of(entry, odd_trees()), max_size=3)
    texts = st.one_of(
        headers.map(json.dumps), st.sampled_from(["[" * 100_000, '{"weight": {}, "weight": {}}', "{}" + " " * 100, ""])
    )
    sizes = st.sampled_from([None, None, None, 0, 2**27, 2**63, 2**64 - 1])
    return st.builds(_safetensors, texts, sizes, st.sampled_from([b"", bytes(8), bytes(12)]))


def _safetensors(text: str, size: int | None, data: bytes) -> bytes:
    header = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def torch_files() -> st.SearchStrategy[bytes]:
    """Zips as torch writes them but with odd pickles, compressed or not; bare pickles."""
    return st.one_of(
        programs(),
        st.builds(_zipped, programs(), st.booleans(), st.sampled_from([bytes(8), bytes(2**16), b""])),
        odd_trees().map(_saved),
    )


def _zipped(program: bytes, packed: bool, storage: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        parts = {"data.pkl": program, "byteorder": b"little", "data/0": storage, "version": b"3\n", ".data/serialization_id": b"1"}
        for name, content in parts.items():
            archive.writestr(f"optimizers/{name}", content)
    return file.getvalue()


def _saved(tree: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def checkpoints(valid: dict[str, bytes]) -> st.SearchStrategy[dict[str, bytes]]:
    """The files of a checkpoint, one of them damaged (with its old or a new checksum) or odd."""
    manifest = json.loads(valid["manifest.json"])
    usual = {name: manifest[name] for name in ("schema", "epoch", "fingerprint", "history", "spec")}

    def resealed(name: str, content: bytes) -> dict[str, bytes]:
        files = {other: valid[other] for other in NAMES} | {name: content}
        return files | {"manifest.json": sealed(dict(usual), files)}

    plain = {name: valid[name] for name in NAMES}
    return st.one_of(
        st.sampled_from(list(valid)).flatmap(lambda name: damaged(valid[name]).map(lambda content: {**valid, name: content})),
        st.sampled_from(NAMES).flatmap(lambda name: damaged(valid[name]).map(lambda content: resealed(name, content))),
        manifests().map(lambda tree: plain | {"manifest.json": sealed(tree, plain)}),
        safetensors().map(lambda content: resealed(NAMES[0], content)),
        torch_files().map(lambda content: resealed(NAMES[1], content)),
        st.sampled_from([b"[" * 100_000, b"{", b'{"a":' * 50_000, b"\xff", b"1" * 5000]).map(
            lambda content: plain | {"manifest.json": content}
        ),
    )


@counts
def test_checkpoints(inputs: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A checkpoint that is opened fills a network, or raises an error of one line."""
    valid = folder_of(tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    folder = run.checkpoint_folders()[0]

    def check(files: dict[str, bytes]) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        read(run.damaged)  # a newer schema is an error
        for opened in (read(run.latest), read(run.best)):
            if isinstance(opened, Checkpoint):
                read(lambda checkpoint=opened: load_weights(nn.Linear(2, 1), checkpoint))
                states = read(opened.optimizer_states)
                assert isinstance(states, dict | Exception)

    drive(request, inputs, "checkpoint", checkpoints(valid), tmp_path, check)


@counts
def test_files_of_networks(inputs: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """`advmoe.load` of one file: safetensors with an odd header, and anything else."""
    from safetensors.torch import save

    config = RunConfig(method="at_dense", model=ModelConfig(backbone="vgg16_bn", width=1))
    state = network(config, SPEC).state_dict()
    usual = {"schema": 1, "config": to_dict(config), "spec": json.loads(json.dumps(SPEC.__dict__)), "epoch": 1, "record": None}
    fields = st.sampled_from(["width", "num_experts", "backbone", "routers", "model_scale", "bank"])

    def packed(content: Any) -> bytes:
        return save(state, {"format": "pt", "advmoe": content if isinstance(content, str) else json.dumps(content)})

    def with_model(name: str, value: Any) -> dict[str, Any]:
        return usual | {"config": {**to_dict(config), "model": {**to_dict(config)["model"], name: value}}}

    valid = packed(usual)
    strategy = st.one_of(
        st.builds(with_model, fields, st.one_of(odd_trees(), odd_numbers())).map(packed),
        st.dictionaries(st.sampled_from(list(usual)), odd_trees(), min_size=1, max_size=2).map(
            lambda changed: packed(usual | changed)
        ),
        manifests().map(lambda tree: packed(usual | {"spec": tree.get("spec") if isinstance(tree, dict) else tree})),
        st.sampled_from(["[" * 50_000, "", "1" * 5000]).map(packed),
        damaged(valid),
        safetensors(),
        torch_files(),
        odd_trees().map(pickle.dumps),
    )
    path = tmp_path / "net.pt"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        read(lambda: load(path))

    assert load_valid(path, valid)
    drive(request, inputs, "network in one file (safetensors)", strategy, tmp_path, check)


def load_valid(path: Path, content: bytes) -> nn.Module:
    """Read the undamaged file, so the others are refused for their damage."""
    path.write_bytes(content)
    return load(path)

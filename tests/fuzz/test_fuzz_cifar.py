"""CIFAR batches: pickles that could run code."""

import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import cifar_batches
import pytest
from damage_bytes import damaged, odd_trees
from driver import counts, drive, read
from hypothesis import strategies as st

from advmoe.config import DataConfig
from advmoe.data import Splits, load_dataset

GLOBALS = [
    ("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("builtins", "bytearray"), ("numpy", "ndarray"),
    ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"), ("_codecs", "encode"), ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"), ("torch", "FloatStorage"), ("advmoe.data.cifar", "load"), ("x", "y"),
]  # fmt: skip
TEXTS = ["touch ran", "latin1", "hex", "punycode", "u1", "O", "i8", "V9999999999", "0", "cpu", "x" * 300]
CODES = {op.name: op.code.encode("latin1") for op in pickletools.opcodes}
BARE = [code for name, code in CODES.items() if not next(op for op in pickletools.opcodes if op.name == name).arg]


def _operations() -> st.SearchStrategy[bytes]:
    """One operation with its argument."""
    text = st.sampled_from(TEXTS).map(lambda text: CODES["BINUNICODE"] + struct.pack("<I", len(text)) + text.encode())
    number = st.sampled_from([0, 1, 3072, 2**31 - 1]).map(lambda value: CODES["BININT"] + struct.pack("<i", value))
    content = st.sampled_from([0, 1, 3072, 10_000]).map(lambda size: CODES["BINBYTES"] + struct.pack("<I", size) + bytes(size))
    named = st.sampled_from(GLOBALS).map(lambda name: CODES["GLOBAL"] + f"{name[0]}\n{name[1]}\n".encode())
    memo = st.builds(
        lambda name, index: CODES[name] + struct.pack("<I" if name.startswith("LONG") else "<B", index),
        st.sampled_from(["BINPUT", "BINGET"]), st.sampled_from([0, 1, 2]),
    )  # fmt: skip
    far = st.builds(
        lambda name, index: CODES[name] + struct.pack("<I", index), st.sampled_from(["LONG_BINPUT", "LONG_BINGET"]),
        st.sampled_from([1, 2**20, 2**31, 2**32 - 1]),
    )  # fmt: skip
    huge = st.builds(
        lambda name, size: CODES[name] + struct.pack("<Q", size),
        st.sampled_from(["BYTEARRAY8", "BINBYTES8", "BINUNICODE8", "FRAME"]), st.sampled_from([1, 2**31, 2**40, 2**63]),
    )  # fmt: skip
    nested = st.sampled_from([b")" + b"2\x86" * 40, b"]" + b"2\x86" * 30 + b"}\x8c\x01as", b")" + b"\x85" * 5000, b"(" * 5000])
    return st.one_of(st.sampled_from(BARE), text, number, content, named, memo, far, huge, nested, st.just(b"K\x01"))


def programs() -> st.SearchStrategy[bytes]:
    """Pickles of arbitrary operations, with function calls and tuples as keys."""
    calls = st.sampled_from(
        [
            b"cos\nsystem\n(X\x09\x00\x00\x00touch rantR", b"(X\x09\x00\x00\x00touch ranios\nsystem\n",
            b"cnumpy\nndarray\n(J\x00\x00\x00\x40X\x02\x00\x00\x00u1tR", b"cnumpy\nndarray\n(J\x00\x00\x00\x40X\x01\x00\x00\x00OtR",
            b"c_codecs\nencode\n(X\x03\x00\x00\x00abcX\x04\x00\x00\x00zlibtR",
            b"c_codecs\nencode\np0\n0C\x08aaaaaaaa" + b"X\x03\x00\x00\x00hexp2\n0p1\n0" + b"g0\n(g1\ng2\ntRp1\n0" * 34 + b"g1\n",
            b"cnumpy\nndarray\n(J\x00\x00\x00\x40X\x02\x00\x00\x00u1tR)K\x07s",
            b"}" + b")" + b"2\x86" * 60 + b"K\x01s", b"}" + b"]\x85" + b"K\x01s", b"Nr\xff\xff\xff\x7f",
            b"\x96" + struct.pack("<Q", 2**35),
            b"}("
            + b"".join(b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") + b"K\x01" for k in range(4000))
            + b"u",
        ]
    )  # fmt: skip
    body = st.lists(st.one_of(_operations(), calls), max_size=12).map(b"".join)
    return st.builds(
        lambda head, operations, end: head + operations + end,
        st.sampled_from([b"", b"\x80\x02", b"\x80\x05"]),
        body,
        st.sampled_from([b".", b""]),
    )


def spliced(content: bytes, program: bytes, number: int) -> bytes:
    """Insert the program's operations between two operations of a valid pickle."""
    positions = [position for _, _, position in pickletools.genops(content) if position]
    cut = positions[number % len(positions)]
    return content[:cut] + program.rstrip(b".").removeprefix(b"\x80\x02").removeprefix(b"\x80\x05") + content[cut:]


def batches(valid: dict[str, list[bytes]]) -> st.SearchStrategy[tuple[str, bytes]]:
    """(data set, content of one batch): odd programs, alone or in a valid batch; odd trees; damage, mostly before the pixels."""

    def of(name: str) -> st.SearchStrategy[bytes]:
        contents = valid[name]
        return st.one_of(
            programs(), st.builds(spliced, st.sampled_from(contents), programs(), st.integers(0, 10**6)), damaged(*contents),
            st.builds(lambda head, tail: head + tail[400:], damaged(*(full[:400] for full in contents)), st.sampled_from(contents)),
            st.dictionaries(st.sampled_from([b"data", b"labels", b"fine_labels"]), odd_trees(), max_size=3).map(pickle.dumps),
        )  # fmt: skip

    return st.sampled_from(sorted(valid)).flatmap(lambda name: of(name).map(lambda content: (name, content)))


@counts
def test_batches(inputs: int, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch gives a data set or an error of one line."""
    monkeypatch.chdir(tmp_path)
    valid: dict[str, list[bytes]] = {}
    files = {}
    for name, write in cifar_batches.WRITERS.items():
        files[name] = write(tmp_path / name)
        content = pickle.loads(files[name].read_bytes())
        valid[name] = [pickle.dumps(content, protocol=protocol) for protocol in (0, 2, 4)]
        assert isinstance(load(name, tmp_path), Splits)

    def check(case: tuple[str, bytes]) -> None:
        name, content = case
        files[name].write_bytes(content)
        result: Any = read(lambda: load(name, tmp_path))
        assert not isinstance(result, Splits) or result.train.pixels().shape[1:] == (3, 32, 32)

    drive(request, inputs, "CIFAR batch (pickle)", batches(valid), tmp_path, check)


def load(name: str, folder: Path) -> Splits:
    return load_dataset(DataConfig(dataset=name, data_dir=str(folder / name)))

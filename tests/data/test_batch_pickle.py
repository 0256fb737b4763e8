"""Pickles of hostile files, and of every protocol."""

import os
import pickle
import shlex
import struct
from pathlib import Path
from typing import Any

import cifar10
import numpy as np
import pytest
import torch
from cifar10 import TEST
from damage import error_line

from advmoe.benchmark.memory import peak
from advmoe.data.batch_pickle import read_pickle, to_array


class Shell:
    """Pickles to a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["alone", "in labels", "in an object array"])
def test_code_in_a_pickle_does_not_run(where: str, protocol: int, tmp_path: Path) -> None:
    shell, mark = Shell(f"touch {shlex.quote(str(tmp_path / 'ran'))}"), tmp_path / "ran"
    content: Any = {
        "alone": shell,
        "in labels": cifar10.batch_content(TEST) | {b"labels": [shell]},
        "in an object array": cifar10.batch_content(TEST) | {b"data": np.array([shell], dtype=object)},
    }[where]
    path = cifar10.write_batches(tmp_path) / "data_batch_1"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert error_line(tmp_path).startswith(f"{path}: not a CIFAR-10 batch (it asks for posix.system")
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()


def test_modules_named_by_a_pickle_are_not_imported(tmp_path: Path) -> None:
    path = cifar10.write_batches(tmp_path) / "data_batch_1"
    path.write_bytes(b"cnumpy.f2py.__main__\ndtype\n.")
    assert "it asks for numpy.f2py.__main__.dtype" in error_line(tmp_path)


BOMBS = {
    "memo of 2**31 entries": b"Nr\xff\xff\xff\x7f.",
    "bytearray of 32 GiB": b"\x96" + struct.pack("<Q", 2**35) + b".",
    "array of 1 GiB": b"cnumpy\nndarray\n(J\x00\x00\x00\x40X\x02\x00\x00\x00u1tR)K\x07s.",
    "hash of 2**60 tuples": b"})" + b"2\x86" * 60 + b"K\x01s.",
    "hash of 2**60 memoized tuples": b"})" + b"".join(b"q\x00h\x00\x86" for _ in range(60)) + b"K\x01s.",
    "text doubled 34 times": b"c_codecs\nencode\np0\n0C\x08aaaaaaaaX\x03\x00\x00\x00hexp2\n0p1\n0"
    + b"g0\n(g1\ng2\ntRp1\n0" * 34
    + b"g1\n.",
    "numbers of one hash": b"}("
    + b"".join(b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") + b"K\x01" for k in range(9000))
    + b"u.",
    "text encoded 3000 times": (
        b"X\x00\x00\x10\x00"
        + b"a" * 2**20
        + b"q\x00c_codecs\nencode\nq\x01X\x06\x00\x00\x00latin1q\x02"
        + b"h\x01h\x00h\x02\x86R" * 3000
        + b"."
    ),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.timeout(20)
def test_pickles_that_would_fill_memory_or_never_end(name: str, tmp_path: Path) -> None:
    path = cifar10.write_batches(tmp_path) / "test_batch"
    path.write_bytes(BOMBS[name])
    lines = []
    assert peak(lambda: lines.append(error_line(tmp_path)), torch.device("cpu")) < 100_000_000
    assert lines[0].startswith(f"{path}: not a CIFAR-10 batch (")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_batches_of_every_protocol_are_the_same(protocol: int, tmp_path: Path) -> None:
    content = cifar10.batch_content(TEST)
    assert (to_array(read_pickle(pickle.dumps(content, protocol=protocol))[b"data"]) == content[b"data"]).all()


def test_a_batch_of_python_2_has_bytes(tmp_path: Path) -> None:
    assert read_pickle(b"\x80\x02}q\x01(U\x04dataq\x02U\x01\xffU\x06labelsq\x03]q\x04(K\x06K\x09eu.") == {
        b"data": b"\xff",
        b"labels": [6, 9],
    }


def test_arrays_by_columns_are_read_by_columns() -> None:
    array = np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    assert (to_array(read_pickle(pickle.dumps(array, protocol=2))) == array).all()

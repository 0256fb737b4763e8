"""Settings of glibc and oneDNN: what they do, and that a user's settings stay."""

import os
import subprocess
import sys

import pytest
import torch

from advmoe import libraries
from advmoe.libraries import keep_compiled_kernels, keep_freed_memory

TOUCH = """
import ctypes, importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("libraries", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
if sys.argv[2] == "keep":
    assert module.keep_freed_memory({})
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def turn():
    for size in (40 * 2**20, 64 * 2**20):
        block = c.malloc(size)
        c.memset(block, 1, size)
        c.free(block)
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
CONVOLVE = """
from advmoe.libraries import tune_libraries
tune_libraries()
import torch
filters = torch.ones(1, 1, 1, 1)
for _ in range(2):
    for images in range(2, 1102):
        torch.nn.functional.conv2d(torch.ones(images, 1, 1, 1), filters)
"""
needs_glibc = pytest.mark.skipif(libraries.platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


@needs_glibc
def test_pages_of_freed_blocks_are_reused():
    faults = {}
    for mode in ("keep", "leave"):
        command = [sys.executable, "-c", TOUCH, libraries.__file__, mode]
        faults[mode] = int(subprocess.run(command, check=True, capture_output=True, text=True, env={}).stdout)
    assert faults["keep"] < 20 < 0.5 * faults["leave"]


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_settings_of_the_user_are_not_changed(name, monkeypatch):
    monkeypatch.setattr(libraries.ctypes, "CDLL", lambda _: pytest.fail("the allocator was touched"))
    assert not keep_freed_memory({name: "glibc.malloc.arena_max=1"})


def test_another_c_library_is_not_changed(monkeypatch):
    monkeypatch.setattr(libraries.platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr(libraries.ctypes, "CDLL", lambda _: pytest.fail("the allocator was touched"))
    assert not keep_freed_memory({})


@needs_glibc
@pytest.mark.parametrize("environment", [{}, {"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}])
def test_memory_is_kept_if_the_environment_does_not_set_the_allocator(environment, monkeypatch):
    monkeypatch.setattr(libraries.ctypes, "CDLL", lambda _: type("C", (), {"mallopt": staticmethod(lambda *_: 1)}))
    assert keep_freed_memory(environment)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN is not part of this torch")
def test_kernels_of_many_batch_sizes_are_compiled_once():
    chosen = (libraries.KERNELS[0], libraries.FORMER_NAME)
    environment = {name: value for name, value in os.environ.items() if name not in chosen} | {"ONEDNN_VERBOSE": "2"}
    command = [sys.executable, "-c", CONVOLVE]
    log = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    lines = [line for line in log.splitlines() if ",convolution," in line]
    misses, hits = (sum(f",create:cache_{kind}," in line for line in lines) for kind in ("miss", "hit"))
    assert misses == hits > 1024  # compiled in the first round, found in the second; oneDNN's default cache holds 1,024


@pytest.mark.parametrize("name", [libraries.KERNELS[0], libraries.FORMER_NAME])
def test_a_kernel_cache_of_the_user_is_not_changed(name, monkeypatch):
    environment = {name: "64"}
    monkeypatch.setattr(os, "environ", environment)
    keep_compiled_kernels()
    assert environment == {name: "64"}

import subprocess
import sys

import pytest

from advmoe import allocator
from advmoe.allocator import keep_freed_memory

TOUCH = """
import ctypes, importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("allocator", sys.argv[1])
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
needs_glibc = pytest.mark.skipif(allocator.platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


@needs_glibc
def test_pages_of_freed_blocks_are_reused():
    faults = {}
    for mode in ("keep", "leave"):
        command = [sys.executable, "-c", TOUCH, allocator.__file__, mode]
        faults[mode] = int(subprocess.run(command, check=True, capture_output=True, text=True, env={}).stdout)
    assert faults["keep"] < 20 < 0.5 * faults["leave"]


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_settings_of_the_user_are_not_changed(name, monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("the allocator was touched"))
    assert not keep_freed_memory({name: "glibc.malloc.arena_max=1"})


def test_another_c_library_is_not_changed(monkeypatch):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("the allocator was touched"))
    assert not keep_freed_memory({})


@needs_glibc
@pytest.mark.parametrize(("environment", "changed"), [({}, True), ({"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}, True)])
def test_memory_is_kept_if_the_environment_does_not_set_the_allocator(environment, changed, monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: type("C", (), {"mallopt": staticmethod(lambda *_: 1)}))
    assert keep_freed_memory(environment) is changed

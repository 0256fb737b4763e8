"""Settings of glibc and oneDNN, for programs whose tensors change their shapes from call to call. What the user has set stays."""

import ctypes
import functools
import os
import platform
from collections.abc import Mapping

KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384"  # oneDNN's default is 1,024
FORMER_NAME = "DNNL_PRIMITIVE_CACHE_CAPACITY"  # oneDNN reads it if the other is not set
# mallopt's parameters (malloc.h) and their values
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
SETTINGS = {MMAP_THRESHOLD: 2**30, TRIM_THRESHOLD: -1, TOP_PAD: 2**26}  # -1 never trims


@functools.cache  # once in a process
def tune_libraries() -> None:
    """Change all of these settings that the user has not set."""
    keep_freed_memory()
    keep_compiled_kernels()


def keep_compiled_kernels() -> None:
    """Let oneDNN keep the kernels that it compiles. It reads the setting at the first convolution of the process.

    A kernel fits one number of images, and an expert gets another number in every batch. If the cache is too small, kernels that
    are needed again are dropped, and compiled once more (docs/performance.md).
    """
    if FORMER_NAME not in os.environ:
        os.environ.setdefault(*KERNELS)


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let glibc keep the memory of freed tensors instead of returning it to the system; return whether that was set.

    By default glibc maps new memory for every large tensor, and each of its pages causes a fault at first use. If two networks
    alternate, a dense pass has some 11,000 page faults (docs/performance.md). Nothing is set if the C library is not glibc, or
    if the user has set MALLOC_* or GLIBC_TUNABLES.
    """
    chosen_by_user = any(name.startswith("MALLOC_") for name in environment) or "malloc" in environment.get("GLIBC_TUNABLES", "")
    if chosen_by_user or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) == 1 for parameter, value in SETTINGS.items()])  # noqa: C419 (every setting is tried)

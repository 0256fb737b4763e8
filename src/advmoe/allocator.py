"""Set glibc's allocator to keep the memory of freed tensors instead of returning it to the system.

By default glibc maps new memory for every large tensor, and each of its pages causes a fault at first use. If two networks
alternate, a dense pass has some 11,000 page faults (docs/performance.md).
"""

import ctypes
import os
import platform
from collections.abc import Mapping

# mallopt's parameters (malloc.h) and their values
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
SETTINGS = {MMAP_THRESHOLD: 2**30, TRIM_THRESHOLD: -1, TOP_PAD: 2**26}  # -1 never trims


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Set the allocator of this process; return whether it was set.

    Nothing is set if the C library is not glibc, or if the user has set MALLOC_* or GLIBC_TUNABLES.
    """
    chosen_by_user = any(name.startswith("MALLOC_") for name in environment) or "malloc" in environment.get("GLIBC_TUNABLES", "")
    if chosen_by_user or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) == 1 for parameter, value in SETTINGS.items()])  # noqa: C419 (every setting is tried)

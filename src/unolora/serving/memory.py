"""Memory of a server that does not grow with the requests it has answered.

glibc takes large blocks from the system and gives them back when they are freed, but each such block that is freed
raises the size from which it does so, up to 32 MB. After some batches of all lengths every tensor lies in the heap,
between the small objects of requests that came and went, and the gaps grow. A fixed size keeps tensors out of there.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
THRESHOLD = 2**20
"""Bytes from which a block is the system's own."""


def keep_flat() -> bool:
    """Fix the sizes for this process; return whether its C library has such a thing."""
    if not sys.platform.startswith("linux"):
        return False
    with suppress(OSError, AttributeError):  # a C library that is not glibc
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_THRESHOLD, THRESHOLD) and mallopt(M_TRIM_THRESHOLD, THRESHOLD))
    return False

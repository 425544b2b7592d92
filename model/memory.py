"""Memory for weights, keys and values on a CPU: in large pages, where the system has them to give.

A decode step reads every weight once. With pages of 4 KiB it waits for the page tables at each of them, in a
virtual machine twice; with pages of 2 MiB a core reads up to half as fast again (docs/kernels.md).
"""

import contextlib
import ctypes
import math
import mmap
import sys
import threading

import torch
from torch import Tensor

CPU = torch.device("cpu")
LARGE_PAGE = 2 << 20
LINE = 64
"""Bytes of a cache line."""
POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE (since 5.14), which `mmap` has no name for."""
REGION = 128 << 20
"""Bytes that are asked of the system at a time: what is smaller shares its pages with others."""


class _Region:
    """Zeroed private memory whose pages may be large, given out from its start to its end."""

    def __init__(self, size: int) -> None:
        mapped = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # not on Linux, or without large pages: slower
            mapped.madvise(mmap.MADV_HUGEPAGE)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(mapped)) % LARGE_PAGE
        self._memory = torch.frombuffer(mapped, dtype=torch.uint8)[start : start + size]
        self._used = 0

    def take(self, size: int) -> Tensor | None:
        """The next `size` bytes, if there are so many."""
        start = -(-self._used // LINE) * LINE
        if start + size > len(self._memory):
            return None
        self._used = start + size
        return self._memory[start : self._used]


_lock = threading.Lock()
_region: _Region | None = None


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """A zeroed tensor; on a CPU it begins at a cache line, and its region goes with the last tensor in it."""
    global _region
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    with _lock:
        memory = _region.take(size) if _region is not None else None
        if memory is None:
            region = _Region(max(REGION, -(-size // LARGE_PAGE) * LARGE_PAGE))
            memory = region.take(size)
            assert memory is not None
            if size < REGION:
                _region = region
    return memory.view(dtype).view(shape)


def populate(memory: Tensor) -> bool:
    """Have the pages of a tensor on a CPU found as if they were written; False where the system cannot.

    What stands in them stays, whoever writes there meanwhile.
    """
    if sys.platform != "linux":
        return False
    before = memory.data_ptr() % mmap.PAGESIZE  # of its first page
    start, size = memory.data_ptr() - before, memory.nbytes + before
    madvise = ctypes.CDLL(None).madvise
    return bool(madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), POPULATE_WRITE) == 0)

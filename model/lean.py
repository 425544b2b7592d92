"""What keeps a server small: torch without its compiler's parts, and no memory of a start that is over."""

import contextlib
import ctypes
import sys
from pathlib import Path
from types import ModuleType

UNUSED = "torch._meta_registrations"
"""What operators make of tensors without data, written in Python: a fifth of the import's time, and 18 MB.
Nothing here computes on such tensors, but torch imports it in any case, and with it much else."""


def import_torch() -> None:
    """Import torch; call it before anything else does, or it does nothing.

    Whoever needs the module later imports it by name, and gets the real one.
    """
    if "torch" in sys.modules or UNUSED in sys.modules:
        return
    sys.modules[UNUSED] = ModuleType(UNUSED)
    import torch

    del sys.modules[UNUSED], torch._meta_registrations


def give_back() -> None:
    """Let the system have what only a start needed: what malloc keeps of it, and code that no more is run."""
    with contextlib.suppress(AttributeError, OSError):  # which is glibc's way; others do it by themselves
        ctypes.CDLL(None).malloc_trim(0)
    _unmap_code()


DONT_NEED = 4
"""Of madvise(2)."""


def _unmap_code() -> None:
    """Unmap the pages of libraries' code, some 40 MB: those that are run again come back from the page cache.

    Code is mapped from its file and never written; nothing else is touched.
    """
    with contextlib.suppress(AttributeError, OSError):  # no /proc, no madvise: it only stays larger
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, mode, _, _, inode, *_ = line.split()
            if mode == "r-xp" and inode != "0":
                start, end = (int(number, 16) for number in span.split("-"))
                libc.madvise(start, end - start, DONT_NEED)

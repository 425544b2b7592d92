"""What keeps a server small: torch without its compiler's parts, and no memory of a start that is over."""

import contextlib
import ctypes
import sys
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
    """Let the system have what malloc keeps of a start's temporary memory: some 11 MB."""
    with contextlib.suppress(AttributeError, OSError):  # which is glibc's way; others do it by themselves
        ctypes.CDLL(None).malloc_trim(0)

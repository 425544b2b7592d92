"""Imports torch without what only its compiler asks for: a fifth of the import's time, and 18 MB."""

import sys
from types import ModuleType

UNUSED = "torch._meta_registrations"
"""What operators make of tensors without data, written in Python. Nothing here computes on such tensors, but
torch imports it in any case, and with it the decompositions and the exporter."""


def import_torch() -> None:
    """Import torch; call it before anything else does, or it does nothing.

    Whoever needs the module later imports it by name, and gets the real one.
    """
    if "torch" in sys.modules or UNUSED in sys.modules:
        return
    sys.modules[UNUSED] = ModuleType(UNUSED)
    import torch

    del sys.modules[UNUSED], torch._meta_registrations

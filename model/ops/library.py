"""The C interface of the native kernels (model/native), by ctypes: one shared library a variant.

ctypes releases the GIL in each call. Nothing here knows what the kernels are used for.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from model.kv_cache import LayerCache

SILU, GELU = 0, 1
"""Activations of gates (linear.h)."""

FOLDER = Path(__file__).parent.parent / "native"


def is_built(variant: str) -> bool:
    """Whether the install could build a variant."""
    return _file(variant).is_file()


class Unusable(Exception):
    """A variant that is built but cannot be used here; the text says why."""


_UNUSABLE = {
    1: "the system does not give this process AMX tiles",
    2: "its AMX tiles do not multiply as they should",
}


def _file(variant: str) -> Path:
    return FOLDER / f"rivulet_{variant}.so"


class Panels(ctypes.Structure):
    """A matrix in panels (panels.h); the memory is the caller's."""

    _fields_ = (("data", c_void_p), ("outputs", c_int64), ("inputs", c_int64), ("bits", c_int32))


class InputRows(ctypes.Structure):
    """Activations in int8 or bfloat16 or both (rows.h)."""

    _fields_ = (
        ("values", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("halves", c_void_p),
        ("inputs", c_int32),
        ("planes", c_int32),
    )


class Pass(ctypes.Structure):
    """What one pass shares (pass.h)."""

    _fields_ = (
        ("rows", c_int32),
        ("selected", c_int32),
        ("table_width", c_int32),
        ("unused", c_int32),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("sequences", c_void_p),
        ("block_tables", c_void_p),
        ("selection", c_void_p),
    )


class Draw(ctypes.Structure):
    """One row's draw (sampling.h)."""

    _fields_ = (
        ("row", c_int32),
        ("top_k", c_int32),
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("typical_p", c_float),
        ("uniform", c_double),
    )


class _LayerCache(ctypes.Structure):
    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("kv_heads", c_int32), ("head_dim", c_int32))

    @classmethod
    def of(cls, cache: LayerCache) -> "_LayerCache":
        return cls(cache.keys.data_ptr(), cache.values.data_ptr(), cache.kv_heads, cache.head_dim)


_Rows, _Panels, _Cache = POINTER(InputRows), POINTER(Panels), POINTER(_LayerCache)

_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "prepare": (c_int32, ()),
    "crew_new": (c_void_p, (c_int32,)),
    "crew_free": (None, (c_void_p,)),
    "tape_new": (c_void_p, ()),
    "tape_free": (None, (c_void_p,)),
    "tape_run": (None, (c_void_p, c_void_p, POINTER(Pass))),
    "panel_bytes": (c_int64, (c_int64, c_int64, c_int32)),
    "repack_rows": (None, (_Panels, c_int64, c_int64, c_void_p, c_int32)),
    "write_rows": (None, (_Panels, c_int64, c_int64, c_void_p)),
    "read_rows": (None, (_Panels, c_int64, c_int64, c_void_p)),
    "embed": (None, (c_void_p, _Panels, c_void_p)),
    "norm": (None, (c_void_p, c_void_p, c_void_p, c_float, _Rows, c_int32)),
    "linear": (None, (c_void_p, _Rows, _Panels, c_int32, c_void_p, c_int32, c_int32)),
    "gated_linear": (None, (c_void_p, _Rows, _Panels, _Panels, c_int32, _Rows)),
    "rotate_and_store": (None, (c_void_p, c_void_p, c_void_p, _Cache, c_int32, c_void_p)),
    "summarise": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p)),
    "sample": (None, (c_void_p, c_void_p, c_int64, c_int64, POINTER(Draw), c_int64, c_void_p)),
    "attention": (None, (c_void_p, c_void_p, _Cache, c_int32, c_int32, _Rows)),
}


class Library:
    """One variant's functions (Unusable)."""

    def __init__(self, variant: str, file: Path | None = None) -> None:
        self.variant = variant
        self._functions = ctypes.CDLL(str(file or _file(variant)))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self._functions, f"rivulet_{name}")
            function.restype, function.argtypes = result, arguments
        if fault := self._functions.rivulet_prepare():
            raise Unusable(_UNUSABLE[fault])
        self.panel_bytes = self._functions.rivulet_panel_bytes
        self.repack_rows = self._functions.rivulet_repack_rows
        self.write_rows = self._functions.rivulet_write_rows
        self.read_rows = self._functions.rivulet_read_rows
        self.summarise = self._functions.rivulet_summarise
        self.sample = self._functions.rivulet_sample

    def new_crew(self, threads: int) -> "Crew":
        """Start threads; they sleep until a tape runs."""
        return Crew(self._functions, threads)

    def new_tape(self) -> "Tape":
        """An empty tape."""
        return Tape(self._functions)


class Crew:
    """Threads that work through tapes, one at a time; the caller is one of them."""

    def __init__(self, functions: ctypes.CDLL, threads: int) -> None:
        self._functions = functions
        self.handle = c_void_p(functions.rivulet_crew_new(threads))

    def __del__(self) -> None:
        self._functions.rivulet_crew_free(self.handle)


class Tape:
    """Recorded work; keeps the buffers that it points at."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions
        self._handle = c_void_p(functions.rivulet_tape_new())
        self.buffers: dict[str, torch.Tensor] = {}

    def __del__(self) -> None:
        self._functions.rivulet_tape_free(self._handle)

    def run(self, crew: Crew, given: Pass) -> None:
        """Do the work for one pass."""
        self._functions.rivulet_tape_run(self._handle, crew.handle, given)

    def embed(self, table: Panels, hidden: int) -> None:
        """See base.py, as for the other ops; pointers are addresses."""
        self._functions.rivulet_embed(self._handle, table, hidden)

    def norm(self, hidden: int, weight: int, epsilon: float, out: InputRows, selected: bool) -> None:
        """Norm and quantise all rows, or the selected ones."""
        self._functions.rivulet_norm(self._handle, hidden, weight, epsilon, out, selected)

    def linear(
        self, rows: InputRows, weight: Sequence[Panels], out: int, accumulate: bool, selected: bool
    ) -> None:
        """A product with one or more matrices, side by side."""
        segments = (Panels * len(weight))(*weight)
        self._functions.rivulet_linear(self._handle, rows, segments, len(weight), out, accumulate, selected)

    def gated_linear(
        self, rows: InputRows, gate: Panels, up: Panels, activation: int, out: InputRows
    ) -> None:
        """activation(gate product) * up product, as input of the next."""
        self._functions.rivulet_gated_linear(self._handle, rows, gate, up, activation, out)

    def rotate_and_store(
        self, projected: int, rotary: int, cache: LayerCache, heads: int, queries: int
    ) -> None:
        """Rotate, and write keys and values."""
        layer = _LayerCache.of(cache)
        self._functions.rivulet_rotate_and_store(self._handle, projected, rotary, layer, heads, queries)

    def attention(self, queries: int, cache: LayerCache, heads: int, window: int, out: InputRows) -> None:
        """Attention within a window (0: none), as input of the next."""
        self._functions.rivulet_attention(self._handle, queries, _LayerCache.of(cache), heads, window, out)

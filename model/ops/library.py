"""The C interface of the native kernels (model/native), by ctypes: one shared library a variant.

ctypes releases the GIL in each call. Nothing here knows what the kernels are used for.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from model.kv_cache import LayerCache

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
"""Of gates, by their number in linear.h."""

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

    _fields_ = (
        ("data", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("bits", c_int32),
        ("zero_points", c_int32),
    )


class InputRows(ctypes.Structure):
    """Activations in int8 or bfloat16 or both (rows.h)."""

    _fields_ = (
        ("values", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("parts", c_void_p),
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
        ("tables", c_int32),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("sequences", c_void_p),
        ("lengths", c_void_p),
        ("block_tables", c_void_p),
        ("selection", c_void_p),
        ("adapters", c_void_p),
        ("narrows", c_int32),
        ("threads", c_int32),
    )


class LowRank(ctypes.Structure):
    """One adapter's part in a product (low_rank.h); the memory is the caller's."""

    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("adapter", c_int32),
        ("rank", c_int32),
        ("first", c_int32),
        ("outputs", c_int32),
    )


class HeadNorm(ctypes.Structure):
    """Norms of queries and keys (row_ops.h); zeros: none."""

    _fields_ = (("query", c_void_p), ("key", c_void_p), ("epsilon", c_float), ("together", c_int32))


class Router(ctypes.Structure):
    """What chooses experts (experts.h)."""

    _fields_ = (
        ("rows", c_void_p),
        ("norm", c_void_p),
        ("weight", c_void_p),
        ("epsilon", c_float),
        ("inputs", c_int32),
        ("experts", c_int32),
        ("per_token", c_int32),
        ("normalised", c_int32),
    )


class Routing(ctypes.Structure):
    """What it chose (experts.h); the memory is the caller's."""

    _fields_ = (
        ("logits", c_void_p),
        ("chosen", c_void_p),
        ("shares", c_void_p),
        ("rows", c_void_p),
        ("weights", c_void_p),
        ("active", c_void_p),
        ("starts", c_void_p),
        ("count", c_void_p),
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
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("group", c_int32),
    )

    @classmethod
    def of(cls, cache: LayerCache) -> "_LayerCache":
        return cls(
            cache.keys.data_ptr(), cache.values.data_ptr(), cache.kv_heads, cache.head_dim, cache.group
        )


_Rows, _Panels, _Cache = POINTER(InputRows), POINTER(Panels), POINTER(_LayerCache)
_Router, _Routing, _HeadNorm = POINTER(Router), POINTER(Routing), POINTER(HeadNorm)

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
    "write_groups": (None, (_Panels, c_int64, c_int64, c_void_p, c_void_p, c_void_p)),
    "read_rows": (None, (_Panels, c_int64, c_int64, c_void_p)),
    "embed": (None, (c_void_p, _Panels, c_float, c_void_p)),
    "norm": (None, (c_void_p, c_void_p, c_void_p, c_float, _Rows, c_int32)),
    "quantise": (None, (c_void_p, c_void_p, _Rows)),
    "add_rows": (None, (c_void_p, c_void_p, c_void_p, c_float, c_float, c_void_p, c_int32)),
    "linear": (
        None,
        (c_void_p, _Rows, _Panels, c_int32, c_void_p, c_float, c_void_p, c_int32, c_int32),
    ),
    "gated_linear": (None, (c_void_p, _Rows, _Panels, _Panels, c_int32, _Rows)),
    "gate_rows": (None, (c_void_p, c_void_p, c_int32, _Rows)),
    "low_rank": (
        None,
        (c_void_p, _Rows, POINTER(LowRank), c_int32, c_void_p, c_float, c_void_p, c_int32),
    ),
    "gated_experts": (None, (c_void_p, _Router, _Routing, _Rows, _Rows, _Panels, _Panels, c_int32, _Rows)),
    "mix_experts": (None, (c_void_p, _Router, _Routing, _Rows, _Panels, c_float, c_void_p, c_int32)),
    "rotate_and_store": (
        None,
        (c_void_p, c_void_p, _HeadNorm, c_void_p, _Cache, c_int32, c_float, c_void_p),
    ),
    "summarise": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int32, c_void_p, c_void_p)),
    "summarise_selected": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int32, c_void_p, c_void_p)),
    "sample": (None, (c_void_p, c_void_p, c_int64, c_int64, POINTER(Draw), c_int64, c_void_p)),
    "narrow": (None, (c_void_p, c_void_p, c_int32, c_void_p, c_int32)),
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
        self.write_groups = self._functions.rivulet_write_groups
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

    def embed(self, table: Panels, multiplier: float, hidden: int) -> None:
        """See base.py, as for the other ops; pointers are addresses."""
        self._functions.rivulet_embed(self._handle, table, multiplier, hidden)

    def norm(self, hidden: int, weight: int, epsilon: float, out: InputRows, selected: bool) -> None:
        """Norm and quantise all rows, or the selected ones."""
        self._functions.rivulet_norm(self._handle, hidden, weight, epsilon, out, selected)

    def quantise(self, rows: int, out: InputRows) -> None:
        """Rows as they are."""
        self._functions.rivulet_quantise(self._handle, rows, out)

    def add_rows(
        self, rows: int, weight: int | None, epsilon: float, multiplier: float, hidden: int, width: int
    ) -> None:
        """Hidden += multiplier * rows, normed if there is a weight."""
        self._functions.rivulet_add_rows(self._handle, rows, weight, epsilon, multiplier, hidden, width)

    def linear(
        self,
        rows: InputRows,
        weight: Sequence[Panels],
        bias: int | None,
        multiplier: float,
        out: int,
        accumulate: bool,
        selected: bool,
    ) -> None:
        """Multiplier * (a product with one or more matrices, side by side, + bias)."""
        self._functions.rivulet_linear(
            self._handle, rows, _array(weight), len(weight), bias, multiplier, out, accumulate, selected
        )

    def gated_linear(
        self, rows: InputRows, gate: Panels, up: Panels, activation: int, out: InputRows
    ) -> None:
        """activation(gate product) * up product, as input of the next."""
        self._functions.rivulet_gated_linear(self._handle, rows, gate, up, activation, out)

    def gate_rows(self, gate_up: int, activation: int, out: InputRows) -> None:
        """activation(gate) * up of rows [gates, ups], as input of the next."""
        self._functions.rivulet_gate_rows(self._handle, gate_up, activation, out)

    def low_rank(
        self,
        rows: InputRows,
        pairs: Sequence[LowRank],
        inner: int,
        multiplier: float,
        out: int,
        outputs: int,
    ) -> None:
        """Add multiplier * what the rows' adapters add to a product that was written down."""
        array = (LowRank * len(pairs))(*pairs)
        self._functions.rivulet_low_rank(
            self._handle, rows, array, len(pairs), inner, multiplier, out, outputs
        )

    def gated_experts(
        self,
        router: Router,
        routing: Routing,
        rows: InputRows,
        gathered: InputRows,
        gates: Sequence[Panels],
        ups: Sequence[Panels],
        activation: int,
        out: InputRows,
    ) -> None:
        """Route the rows, gather them by expert, and do for each what gated_linear does."""
        self._functions.rivulet_gated_experts(
            self._handle, router, routing, rows, gathered, _array(gates), _array(ups), activation, out
        )

    def mix_experts(
        self,
        router: Router,
        routing: Routing,
        rows: InputRows,
        downs: Sequence[Panels],
        multiplier: float,
        out: int,
        accumulate: bool,
    ) -> None:
        """Multiplier * (each row's experts' last product, by their shares)."""
        self._functions.rivulet_mix_experts(
            self._handle, router, routing, rows, _array(downs), multiplier, out, accumulate
        )

    def rotate_and_store(
        self,
        projected: int,
        norm: HeadNorm,
        rotary: int | None,
        cache: LayerCache,
        heads: int,
        scale: float,
        queries: int,
    ) -> None:
        """Norm, rotate and scale, and write keys and values."""
        layer = _LayerCache.of(cache)
        self._functions.rivulet_rotate_and_store(
            self._handle, projected, norm, rotary, layer, heads, scale, queries
        )

    def narrow(self, hidden: torch.Tensor, queries: torch.Tensor) -> None:
        """What follows works on the selected rows alone, if the pass says so."""
        self._functions.rivulet_narrow(
            *(self._handle, hidden.data_ptr(), hidden.shape[1], queries.data_ptr(), queries.shape[1])
        )

    def summarise(self, logits: torch.Tensor, best: torch.Tensor, normaliser: torch.Tensor) -> None:
        """The selected rows' best tokens and the logarithms of their sums of exponentials."""
        rows, size = logits.shape
        self._functions.rivulet_summarise_selected(
            *(self._handle, logits.data_ptr(), logits.stride(0), size, rows),
            *(best.data_ptr(), normaliser.data_ptr()),
        )

    def attention(self, queries: int, cache: LayerCache, heads: int, window: int, out: InputRows) -> None:
        """Attention within a window (0: none), as input of the next."""
        self._functions.rivulet_attention(self._handle, queries, _LayerCache.of(cache), heads, window, out)


def _array(panels: Sequence[Panels]) -> "ctypes.Array[Panels]":
    return (Panels * len(panels))(*panels)

"""The op set for x86-64 CPUs: recorded once from the model's own Python, replayed by C++ kernels.

While it records, each op appends its work to a tape and hands on a handle; an op that only feeds the
next one (a product before the residual, gate and up before silu) waits for it, and both become one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import SamplingParams
from model.kv_cache import CacheLayout, LayerCache
from model.ops import library
from model.ops.library import InputRows, Library
from model.ops.native_pass import BLOCK_SIZE, Pass
from model.ops.panels import GROUP, LANES, Matrix, aligned
from model.ops.sampling import bounded
from model.weights.stored import StoredTensor


@dataclass(frozen=True, slots=True)
class Hidden:
    """Float32 rows of the residual stream."""

    rows: Tensor
    selected: bool = False


@dataclass(frozen=True, slots=True)
class Quantised:
    """Rows in the form that a product reads."""

    rows: InputRows
    selected: bool = False


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product that is not recorded yet: what comes next decides where it goes."""

    rows: Quantised
    weight: Matrix


@dataclass(frozen=True, slots=True)
class Queries:
    """Rotated and scaled queries in bfloat16."""

    rows: Tensor


class NativeOps:
    """The ops (see base.py) in C++; `library` names the variant, `threads` the crew's size."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, lib: Library, threads: int, bits: int = 8) -> None:
        self.name = f"native {lib.variant}"
        self.threads = threads
        self._lib = lib
        self._bits = bits  # of weights that are stored as plain numbers: 4, 8, or 16 for bfloat16
        self._wants_int8 = self._wants_bf16 = False
        self._crew = lib.new_crew(threads)
        self.sampling = NativeSampling(lib, self._crew)
        self._tape: library.Tape | None = None
        self._max_rows = self._max_selected = 0

    # -- weights and cache ----------------------------------------------------------------------------

    def matrix(self, outputs: int, inputs: int) -> Matrix:
        """A matrix whose panels are allocated when it is filled, in the width that its file asks for."""
        return Matrix(outputs, inputs)

    def vector(self, size: int) -> Tensor:
        """A norm's weight in float32."""
        return aligned(size, torch.float32)

    def split(self, weight: Matrix, sizes: Sequence[int]) -> tuple[Matrix, ...]:
        """Parts that make the matrix up."""
        assert sum(sizes) == weight.outputs and not any(size % LANES for size in sizes)
        if not weight.parts:
            weight.parts = tuple(Matrix(size, weight.inputs) for size in sizes)
        return weight.parts

    def shape(self, weight: Matrix | Tensor) -> tuple[int, ...]:
        """[outputs, inputs], or a vector's size."""
        return tuple(weight.shape) if isinstance(weight, Tensor) else (weight.outputs, weight.inputs)

    def fill(self, weight: Matrix | Tensor, stored: StoredTensor) -> None:
        """Repack blocks as they are where panels can hold them; else quantise."""
        if isinstance(weight, Tensor):
            weight.copy_(stored.dequantise())
            return
        bits = weight.fill(self._lib, stored, self._bits)
        # Each form of the activations is only written if some weight reads it.
        self._wants_bf16 |= bits == 16
        self._wants_int8 |= bits != 16

    def cache_layout(self, kv_heads: int, head_dim: int) -> CacheLayout:
        """In pairs of dimensions (keys) and of tokens (values), as the bfloat16 dot products read them."""
        keys = (kv_heads, head_dim // 2, BLOCK_SIZE, 2)
        values = (kv_heads, BLOCK_SIZE // 2, head_dim, 2)
        return CacheLayout(BLOCK_SIZE, keys, values, torch.bfloat16, self.device)

    # -- recording ------------------------------------------------------------------------------------

    @contextmanager
    def recording(self, max_rows: int, max_selected: int) -> Iterator["Replay"]:
        """Record what the ops are asked within; buffers are made for so many rows."""
        assert self._tape is None
        tape = self._tape = self._lib.new_tape()
        self._max_rows, self._max_selected = max_rows, max_selected
        try:
            yield Replay(tape, self._crew)
        finally:
            self._tape = None

    def _buffer(self, width: int, dtype: torch.dtype, role: str, rows: int) -> Tensor:
        """A workspace buffer; the same role gets the same one in each layer."""
        tape = self._recorded()
        key = f"{role} {width} {dtype} {rows}"
        if key not in tape.buffers:
            tape.buffers[key] = aligned(rows * width, dtype).view(rows, width)
        return tape.buffers[key]

    def _quantised(self, width: int, role: str, selected: bool) -> Quantised:
        # The few rows that the logits come from get a second plane: theirs is a third of all the noise.
        planes = 2 if selected else 1
        count = planes * (self._max_selected if selected else self._max_rows)
        groups = width // GROUP
        pointers = [0, 0, 0, 0]
        if self._wants_int8 or not self._wants_bf16:
            values = self._buffer(width, torch.int8, role, count)
            scales = self._buffer(groups, torch.float32, f"{role} scales", count)
            sums = self._buffer(groups, torch.float32, f"{role} sums", count)
            pointers[:3] = values.data_ptr(), scales.data_ptr(), sums.data_ptr()
        if self._wants_bf16:
            pointers[3] = self._buffer(width, torch.bfloat16, role, count).data_ptr()
        return Quantised(InputRows(*pointers, width, planes), selected)

    def _recorded(self) -> library.Tape:
        assert self._tape is not None, "the native ops only record"
        return self._tape

    # -- the ops --------------------------------------------------------------------------------------

    def embed(self, inputs: None, table: Matrix) -> Hidden:
        """Rows of the embedding's panels."""
        (panels,) = table.segments()
        hidden = self._buffer(table.inputs, torch.float32, "hidden", self._max_rows)
        self._recorded().embed(panels, hidden.data_ptr())
        return Hidden(hidden)

    def rms_norm(self, x: Hidden, weight: Tensor, epsilon: float) -> Quantised:
        """Norm and quantisation in one."""
        out = self._quantised(len(weight), "normed", x.selected)
        self._recorded().norm(x.rows.data_ptr(), weight.data_ptr(), epsilon, out.rows, x.selected)
        return out

    def linear(self, x: Quantised, weight: Matrix) -> Product:
        """Wait for what the product is for."""
        return Product(x, weight)

    def add(self, x: Hidden, y: Product) -> Hidden:
        """A product that is added to what is there."""
        self._recorded().linear(y.rows.rows, y.weight.segments(), x.rows.data_ptr(), True, False)
        return x

    def silu_mul(self, gate_up: Product) -> Quantised:
        """Both products, the gate and the quantisation in one."""
        return self._gated(gate_up, library.SILU)

    def gelu_mul(self, gate_up: Product) -> Quantised:
        """The same with the other gate."""
        return self._gated(gate_up, library.GELU)

    def _gated(self, gate_up: Product, activation: int) -> Quantised:
        gate, up = gate_up.weight.parts
        out = self._quantised(gate.outputs, "gated", selected=False)
        (gate_panels,), (up_panels,) = gate.segments(), up.segments()
        self._recorded().gated_linear(gate_up.rows.rows, gate_panels, up_panels, activation, out.rows)
        return out

    def rotate_and_store(
        self, qkv: Product, rotary: Tensor, cache: LayerCache, inputs: None, num_heads: int
    ) -> Queries:
        """The product, then the rotation."""
        projected = self._materialise(qkv, "projected", selected=False)
        width = num_heads * cache.head_dim
        queries = self._buffer(width, torch.bfloat16, "queries", self._max_rows)
        self._recorded().rotate_and_store(
            projected.data_ptr(), rotary.data_ptr(), cache, num_heads, queries.data_ptr()
        )
        return Queries(queries)

    def attention(self, query: Queries, cache: LayerCache, inputs: None, window: int | None) -> Quantised:
        """Attention and quantisation in one."""
        width = query.rows.shape[1]
        out = self._quantised(width, "attended", selected=False)
        self._recorded().attention(
            query.rows.data_ptr(), cache, width // cache.head_dim, window or 0, out.rows
        )
        return out

    def select(self, x: Hidden, rows: None) -> Hidden:
        """The pass says which."""
        return Hidden(x.rows, selected=True)

    def logits(self, x: Quantised, weight: Matrix) -> Tensor:
        """The buffer that the selected rows' logits are written to."""
        return self._materialise(Product(x, weight), "logits", selected=True)

    def _materialise(self, product: Product, role: str, selected: bool) -> Tensor:
        count = self._max_selected if selected else self._max_rows
        out = self._buffer(product.weight.rows, torch.float32, role, count)
        self._recorded().linear(product.rows.rows, product.weight.segments(), out.data_ptr(), False, selected)
        return out[:, : product.weight.outputs]


class NativeSampling:
    """Sampling (see sampling.py) by the crew, a row a task."""

    def __init__(self, lib: Library, crew: library.Crew) -> None:
        self._lib = lib
        self._crew = crew

    def summarise(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, vocabulary] -> [rows], [rows]."""
        rows, size = logits.shape
        best, normaliser = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        self._lib.summarise(
            self._crew.handle,
            logits.data_ptr(),
            logits.stride(0),
            size,
            rows,
            best.data_ptr(),
            normaliser.data_ptr(),
        )
        return best, normaliser

    def draw(self, logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
        """[rows, vocabulary] -> [rows]."""
        draws = (library.Draw * len(params))(
            *(
                library.Draw(row, p.top_k, bounded(p.temperature), p.top_p, p.min_p, p.typical_p, uniform)
                for row, (p, uniform) in enumerate(zip(params, uniforms, strict=True))
            )
        )
        tokens = torch.empty(len(params), dtype=torch.int64)
        self._lib.sample(
            self._crew.handle,
            logits.data_ptr(),
            logits.stride(0),
            logits.shape[1],
            draws,
            len(params),
            tokens.data_ptr(),
        )
        return tokens


class Replay:
    """A finished tape with the crew that works through it."""

    def __init__(self, tape: library.Tape, crew: library.Crew) -> None:
        self._tape = tape
        self._crew = crew

    def run(self, given: Pass) -> None:
        """One pass; the GIL is free while it runs."""
        self._tape.run(self._crew, given.struct)

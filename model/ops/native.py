"""The op set for x86-64 CPUs: recorded once from the model's own Python, replayed by C++ kernels.

While it records, each op appends its work to a tape and hands on a handle; an op that only feeds the
next one (a product before the residual, gate and up before silu) waits for it, and both become one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from model import memory
from model.config import ExpertsConfig
from model.kv_cache import CacheLayout, LayerCache
from model.ops import library
from model.ops.base import LowRank, QueryKeyNorm
from model.ops.library import InputRows, Library
from model.ops.native_adapters import AdapterPanels
from model.ops.native_handles import Floats, Hidden, Mixture, Product, Quantised, Queries
from model.ops.native_pass import BLOCK_SIZE, Pass
from model.ops.native_sampling import NativeSampling
from model.ops.panels import GROUP, LANES, Matrix, panel_bits
from model.ops.sampling import Scores
from model.weights.stored import StoredTensor


class NativeOps:
    """The ops (see base.py) in C++; `library` names the variant, `threads` the crew's size."""

    dtype = torch.float32
    device = torch.device("cpu")
    exact_rows = True

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
        """A norm's weight or a bias in float32."""
        return memory.zeros((size,), torch.float32)

    def router(self, experts: int, inputs: int) -> Tensor:
        """In float32: rounding it would choose other experts."""
        return memory.zeros((experts, inputs), torch.float32)

    def split(self, weight: Matrix | Tensor, sizes: Sequence[int]) -> tuple[Matrix | Tensor, ...]:
        """Parts that make the matrix up, or views of a vector."""
        if isinstance(weight, Tensor):
            return torch.split(weight, list(sizes))
        if len(sizes) == 1:
            return (weight,)
        assert sum(sizes) == weight.outputs and not any(size % LANES for size in sizes)
        if not weight.parts:
            weight.parts = tuple(Matrix(size, weight.inputs) for size in sizes)
        return weight.parts

    def shape(self, weight: Matrix | Tensor) -> tuple[int, ...]:
        """[outputs, inputs], or a vector's size."""
        return tuple(weight.shape) if isinstance(weight, Tensor) else (weight.outputs, weight.inputs)

    def weight_bytes(self, weight: Matrix | Tensor, stored: StoredTensor) -> int:
        """A matrix's panels, in the bits that the tensor goes to."""
        if isinstance(weight, Tensor):
            return weight.nbytes
        size: int = self._lib.panel_bytes(weight.rows, weight.inputs, panel_bits(stored, self._bits))
        return size

    def fill(self, weight: Matrix | Tensor, stored: StoredTensor) -> None:
        """Repack blocks as they are where panels can hold them; else quantise."""
        if isinstance(weight, Tensor):
            weight.copy_(stored.dequantise())
            return
        bits = weight.fill(self._lib, stored, self._bits)
        # Each form of the activations is only written if some weight reads it.
        self._wants_bf16 |= bits == 16
        self._wants_int8 |= bits != 16

    def adapters(self, pairs: Sequence[LowRank]) -> AdapterPanels:
        """In fp16 panels."""
        return AdapterPanels.of(pairs)

    def cache_layout(self, kv_heads: int, head_dim: int) -> CacheLayout:
        """In pairs of dimensions (keys) and of tokens (values), as the bfloat16 dot products read them."""
        keys = (kv_heads, head_dim // 2, BLOCK_SIZE, 2)
        values = (kv_heads, BLOCK_SIZE // 2, head_dim, 2)
        return CacheLayout(BLOCK_SIZE, keys, values, torch.bfloat16, self.device)

    # -- recording ------------------------------------------------------------------------------------

    @contextmanager
    def recording(
        self, max_rows: int, max_selected: int, after: "Replay | None" = None
    ) -> Iterator["Replay"]:
        """Record what the ops are asked within; buffers are made for so many rows.

        What is to be replayed `after` another works in the same buffers.
        """
        assert self._tape is None
        tape = self._tape = self._lib.new_tape()
        if after is not None:
            tape.buffers = after.tape.buffers
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
            tape.buffers[key] = memory.zeros((rows, width), dtype)
        return tape.buffers[key]

    def _quantised(self, width: int, role: str, selected: bool, source: Floats | None = None) -> Quantised:
        # The few rows that the logits come from get 16 bits: theirs would be a third of all the noise.
        planes = 2 if selected else 1
        count = self._max_selected if selected else self._max_rows
        return Quantised(self._input_rows(width, role, count, planes), selected, source)

    def _input_rows(self, width: int, role: str, count: int, planes: int = 1) -> InputRows:
        groups = width // GROUP
        pointers = [0, 0, 0, 0, 0]
        if self._wants_int8 or not self._wants_bf16:
            values = self._buffer(width, torch.int8, role, count * planes)
            scales = self._buffer(groups, torch.float32, f"{role} scales", count)
            sums = self._buffer(groups, torch.float32, f"{role} sums", count)
            parts = self._buffer(groups, torch.int32, f"{role} parts", count)
            pointers[:4] = values.data_ptr(), scales.data_ptr(), sums.data_ptr(), parts.data_ptr()
        if self._wants_bf16:
            pointers[4] = self._buffer(width, torch.bfloat16, role, count * planes).data_ptr()
        return InputRows(*pointers, width, planes)

    def _recorded(self) -> library.Tape:
        assert self._tape is not None, "the native ops only record"
        return self._tape

    # -- the ops --------------------------------------------------------------------------------------

    def embed(self, inputs: None, table: Matrix, multiplier: float = 1.0) -> Hidden:
        """Rows of the embedding's panels."""
        (panels,) = table.segments()
        hidden = self._buffer(table.inputs, torch.float32, "hidden", self._max_rows)
        self._recorded().embed(panels, multiplier, hidden.data_ptr())
        return Hidden(hidden)

    def rms_norm(
        self, x: Hidden | Product | Mixture | Floats, weight: Tensor, epsilon: float
    ) -> Quantised | Floats:
        """Norm and quantisation in one; what goes back to the residual stream is normed on its way there."""
        if not isinstance(x, Hidden):
            return Floats(self._floats(x), weight, epsilon)
        out = self._quantised(len(weight), "normed", x.selected, Floats(x.rows, weight, epsilon))
        self._recorded().norm(x.rows.data_ptr(), weight.data_ptr(), epsilon, out.rows, x.selected)
        return out

    def linear(self, x: Quantised | Hidden, weight: Matrix, bias: Tensor | None = None) -> Product:
        """Wait for what the product is for."""
        return Product(self._input(x), weight, bias)

    def low_rank(self, y: Product, x: Quantised | Hidden, adapters: AdapterPanels, inputs: None) -> Product:
        """Added when the product is written."""
        return replace(y, adapters=adapters)

    def add(
        self, x: Hidden | Mixture | Floats, y: Product | Mixture | Floats, multiplier: float = 1.0
    ) -> Hidden | Floats:
        """What is not recorded yet is added to what is there."""
        if isinstance(x, Mixture):
            x = Floats(self._floats(x))
        if isinstance(y, Floats):
            weight = None if y.weight is None else y.weight.data_ptr()
            rows, width = y.rows.data_ptr(), y.rows.shape[1]
            self._recorded().add_rows(rows, weight, y.epsilon, multiplier, x.rows.data_ptr(), width)
        else:
            self._record(y, x.rows, multiplier, accumulate=True)
        return x

    def gated(self, gate_up: Product, activation: str) -> Quantised:
        """Both products, the gate and the quantisation in one."""
        gate, up = gate_up.weight.parts
        out = self._quantised(gate.outputs, "gated", selected=False)
        kind = library.ACTIVATIONS[activation]
        if gate_up.adapters is not None:
            rows = self._materialise(gate_up, "gate and up", selected=False)
            self._recorded().gate_rows(rows.data_ptr(), kind, out.rows)
            return out
        (gate_panels,), (up_panels,) = gate.segments(), up.segments()
        self._recorded().gated_linear(gate_up.rows.rows, gate_panels, up_panels, kind, out.rows)
        return out

    def experts(
        self,
        x: Quantised | Hidden,
        router: Tensor,
        gate_ups: Sequence[Matrix],
        downs: Sequence[Matrix],
        config: ExpertsConfig,
        activation: str,
    ) -> Mixture:
        """Routing, and the gates of the chosen experts; the rest waits for what it is for."""
        given = self._input(x)
        choice = router_of(given.source, router, config)
        routing = self._routing(config)
        count = self._max_rows * config.per_token
        gathered = self._input_rows(given.rows.inputs, "gathered", count)
        out = self._input_rows(config.intermediate_size, "gated by experts", count)
        gates, ups = zip(*(gate_up.segments() for gate_up in gate_ups), strict=True)
        kind = library.ACTIVATIONS[activation]
        self._recorded().gated_experts(choice, routing, given.rows, gathered, gates, ups, kind, out)
        return Mixture(choice, routing, out, tuple(panels for down in downs for panels in down.segments()))

    def _routing(self, config: ExpertsConfig) -> library.Routing:
        def place(role: str, width: int, dtype: torch.dtype, rows: int = self._max_rows) -> int:
            return self._buffer(width, dtype, f"routing: {role}", rows).data_ptr()

        return library.Routing(
            logits=place("logits", config.count, torch.float32),
            chosen=place("chosen", config.per_token, torch.int32),
            shares=place("shares", config.per_token, torch.float32),
            rows=place("rows", config.per_token, torch.int32),
            weights=place("weights", config.per_token, torch.float32),
            active=place("active", config.count, torch.int32, rows=1),
            starts=place("starts", config.count + 1, torch.int32, rows=1),
            count=place("count", 1, torch.int32, rows=1),
        )

    def rotate_and_store(
        self,
        qkv: Product,
        rotary: Tensor | None,
        cache: LayerCache,
        inputs: None,
        num_heads: int,
        scale: float,
        *,
        norm: QueryKeyNorm | None = None,
    ) -> Queries:
        """The product, then norms, rotation and scale in one."""
        projected = self._materialise(qkv, "projected", selected=False)
        width = num_heads * cache.head_dim
        queries = self._buffer(width, torch.bfloat16, "queries", self._max_rows)
        norms = library.HeadNorm()
        if norm is not None:
            together = len(norm.query) != cache.head_dim
            norms = library.HeadNorm(norm.query.data_ptr(), norm.key.data_ptr(), norm.epsilon, together)
        table = None if rotary is None else rotary.data_ptr()
        self._recorded().rotate_and_store(
            projected.data_ptr(), norms, table, cache, num_heads, scale, queries.data_ptr()
        )
        return Queries(queries)

    def narrow(self, x: Hidden, query: Queries) -> tuple[Hidden, Queries]:
        """In place; the pass says whether."""
        self._recorded().narrow(x.rows, query.rows)
        return x, query

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

    def logits(self, x: Quantised, weight: Matrix, multiplier: float = 1.0) -> Tensor:
        """The buffer that the selected rows' logits are written to."""
        return self._materialise(Product(x, weight), "logits", selected=True, multiplier=multiplier)

    def summarise(self, logits: Tensor) -> Scores:
        """The buffers that the selected rows' best tokens and normalisers are written to."""
        best = self._buffer(1, torch.int64, "best", self._max_selected)[:, 0]
        normaliser = self._buffer(1, torch.float32, "normaliser", self._max_selected)[:, 0]
        self._recorded().summarise(logits, best, normaliser)
        return Scores(logits, best.numpy(), normaliser)

    def _input(self, x: Quantised | Hidden) -> Quantised:
        """What a product reads: the residual stream itself is quantised for it."""
        if isinstance(x, Quantised):
            return x
        assert not x.selected
        out = self._quantised(x.rows.shape[1], "normed", selected=False, source=Floats(x.rows))
        self._recorded().quantise(x.rows.data_ptr(), out.rows)
        return out

    def _record(
        self,
        y: Product | Mixture,
        out: Tensor,
        multiplier: float,
        *,
        accumulate: bool,
        selected: bool = False,
    ) -> None:
        """What waited goes to `out`, or is added to what is there."""
        tape, to = self._recorded(), out.data_ptr()
        if isinstance(y, Mixture):
            tape.mix_experts(y.router, y.routing, y.rows, y.downs, multiplier, to, accumulate)
            return
        assert y.bias is None or len(y.bias) == y.weight.rows
        bias = None if y.bias is None else y.bias.data_ptr()
        tape.linear(y.rows.rows, y.weight.segments(), bias, multiplier, to, accumulate, selected)
        if y.adapters is not None:
            assert not selected
            inner = self._buffer(y.adapters.width, torch.float32, "inner", self._max_rows)
            tape.low_rank(y.rows.rows, y.adapters.pairs, inner.data_ptr(), multiplier, to, y.weight.rows)

    def _materialise(self, product: Product, role: str, selected: bool, multiplier: float = 1.0) -> Tensor:
        count = self._max_selected if selected else self._max_rows
        out = self._buffer(product.weight.rows, torch.float32, role, count)
        self._record(product, out, multiplier, accumulate=False, selected=selected)
        return out[:, : product.weight.outputs]

    def _floats(self, y: Product | Mixture | Floats) -> Tensor:
        """Rows that go to the residual stream, written down on their way."""
        if isinstance(y, Floats):
            assert y.weight is None
            return y.rows
        width = y.downs[0].outputs if isinstance(y, Mixture) else y.weight.rows
        out = self._buffer(width, torch.float32, "branch", self._max_rows)
        self._record(y, out, 1.0, accumulate=False)
        return out


def router_of(source: Floats | None, weight: Tensor, config: ExpertsConfig) -> library.Router:
    """What chooses a row's experts, from numbers that were not rounded yet."""
    assert source is not None
    norm = None if source.weight is None else source.weight.data_ptr()
    return library.Router(
        rows=source.rows.data_ptr(),
        norm=norm,
        weight=weight.data_ptr(),
        epsilon=source.epsilon,
        inputs=weight.shape[1],
        experts=config.count,
        per_token=config.per_token,
        normalised=config.normalised,
    )


class Replay:
    """A finished tape with the crew that works through it."""

    def __init__(self, tape: library.Tape, crew: library.Crew) -> None:
        self.tape = tape
        self._crew = crew

    def run(self, given: Pass) -> None:
        """One pass; the GIL is free while it runs."""
        self.tape.run(self._crew, given.struct)

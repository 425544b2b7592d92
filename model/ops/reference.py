"""The op set in plain torch: the reference on any device, and what serves where nothing faster is built.

Knows about rows, slots and weights; not about layers, requests or sampling. The attention reads the
cache where it lies: a decode step copies no key and no value.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch, Chunk
from model.kv_cache import CacheLayout, LayerCache
from model.weights.stored import StoredTensor


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Attention of one chunk of several rows."""

    rows: slice
    slots: Tensor  # [context]: the sequence's slots that some row sees, up to the chunk's end
    mask: Tensor | None  # [rows, context], True = visible; None where each row sees all up to its own


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Attention of all chunks of a single row, as a sparse product.

    With one matrix row for each query head and one column for each (slot, kv head), the scores are the
    product of queries and keys sampled where a block table says so: `pattern`. Its values are laid
    out row after row; `places` puts them into a rectangle for the softmax.
    """

    rows: Tensor  # [sequences]
    pattern: Tensor  # sparse CSR [sequences * heads, slots * kv_heads]
    columns: Tensor  # [n]: kv-head-wise slots
    starts: Tensor  # [sequences * heads]: where each row's values begin
    places: Tensor | None  # [n] in [sequences * heads, longest]; None where all are of one length
    longest: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A batch as tensors: what every layer of one pass shares."""

    token_ids: Tensor  # [rows]
    positions: Tensor  # [rows]
    slots: Tensor  # [rows]: where each row's key and value go


@dataclass(frozen=True, slots=True)
class TorchInputs(StepInputs):
    """With the plan of the reference attention."""

    window: int | None
    decode: DecodePlan | None
    prefills: tuple[PrefillPlan, ...]


class TorchOps:
    """The ops (see base.py) on tensors [rows, features] in the weights' type."""

    name = "torch"
    block_size = 16

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        # The sparse product exists in single precision only; scores in bfloat16 would be no faster.
        self.cache_dtype = torch.float32
        with warnings.catch_warnings():  # torch says once that CSR tensors are beta: not news to our users
            warnings.simplefilter("ignore", UserWarning)
            torch.sparse_csr_tensor([0], [], [], size=(0, 0))

    # -- weights and cache ----------------------------------------------------------------------------

    def matrix(self, outputs: int, inputs: int) -> Tensor:
        """Allocate a matrix."""
        return torch.empty(outputs, inputs, dtype=self.dtype, device=self.device)

    def vector(self, size: int) -> Tensor:
        """Allocate a norm's weight."""
        return torch.empty(size, dtype=self.dtype, device=self.device)

    def split(self, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """Views of a matrix."""
        return torch.split(weight, list(sizes))

    def shape(self, weight: Tensor) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(weight.shape)

    def fill(self, weight: Tensor, stored: StoredTensor) -> None:
        """Copy the numbers, rounded to the weights' type."""
        weight.copy_(stored.dequantise())

    def cache_layout(self, kv_heads: int, head_dim: int) -> CacheLayout:
        """Keys and values alike: token by token."""
        shape = (self.block_size, kv_heads, head_dim)
        return CacheLayout(self.block_size, shape, shape, self.cache_dtype, self.device)

    # -- what a pass shares ---------------------------------------------------------------------------

    def prepare(
        self, batch: Batch, num_heads: int, num_kv_heads: int, window: int | None = None
    ) -> StepInputs:
        """Lay a batch out as tensors; the rows stand in the order of its chunks."""
        shared = self._rows(batch)
        decodes, prefills, row = [], [], 0
        for chunk in batch.chunks:
            if chunk.count == 1:
                decodes.append((row, chunk))
            else:
                prefills.append(self._prefill_plan(row, chunk, window))
            row += chunk.count
        return TorchInputs(
            token_ids=shared.token_ids,
            positions=shared.positions,
            slots=shared.slots,
            window=window,
            decode=self._decode_plan(decodes, num_heads, num_kv_heads, window) if decodes else None,
            prefills=tuple(prefills),
        )

    def _rows(self, batch: Batch) -> StepInputs:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        size = self.block_size
        for chunk in batch.chunks:
            span = range(chunk.start, chunk.stop)
            token_ids.extend(chunk.token_ids[chunk.start : chunk.stop])
            positions.extend(span)
            slots.extend(chunk.block_table[p // size] * size + p % size for p in span)
        return StepInputs(self._index(token_ids), self._index(positions), self._index(slots))

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _slots(self, chunk: Chunk, first: int) -> Tensor:
        """The slots of a sequence's positions from `first` to the end of its chunk."""
        blocks = self._index(chunk.block_table)[:, None] * self.block_size
        return (blocks + torch.arange(self.block_size, device=self.device)).flatten()[first : chunk.stop]

    def _prefill_plan(self, row: int, chunk: Chunk, window: int | None) -> PrefillPlan:
        mask, first = None, _first_visible(chunk, window)
        if chunk.start > 0 or (window is not None and chunk.stop > window):
            # Lower right: row i of the chunk stands at position start + i and sees all up to there.
            shape = (chunk.count, chunk.stop)
            mask = torch.ones(shape, dtype=torch.bool, device=self.device).tril(chunk.start)
            if window is not None:
                mask = mask.triu(chunk.start - window + 1)
            mask = mask[:, first:]
        return PrefillPlan(slice(row, row + chunk.count), self._slots(chunk, first), mask)

    def _decode_plan(
        self, decodes: Sequence[tuple[int, Chunk]], num_heads: int, num_kv_heads: int, window: int | None
    ) -> DecodePlan:
        firsts = [_first_visible(chunk, window) for _, chunk in decodes]
        visible = [chunk.stop - first for (_, chunk), first in zip(decodes, firsts, strict=True)]
        group = num_heads // num_kv_heads
        kv_head = (torch.arange(num_heads, device=self.device) // group)[:, None]  # [heads, 1]
        columns = torch.cat(
            [
                (self._slots(chunk, first) * num_kv_heads + kv_head).flatten()
                for (_, chunk), first in zip(decodes, firsts, strict=True)
            ]
        )  # [n], for each sequence [heads, context]
        assert len(columns) == num_heads * sum(visible)  # the product trusts us
        contexts = self._index(visible)
        lengths = contexts.repeat_interleave(num_heads)  # [sequences * heads]
        bounds = F.pad(lengths.cumsum(0), (1, 0))
        longest = max(visible)
        places = None
        if min(visible) < longest:
            matrix_row = torch.arange(len(lengths), device=self.device).repeat_interleave(lengths)
            places = (
                torch.arange(len(columns), device=self.device) - bounds[matrix_row] + matrix_row * longest
            )
        width = (max(max(chunk.block_table) for _, chunk in decodes) + 1) * self.block_size * num_kv_heads
        pattern = torch.sparse_csr_tensor(
            bounds, columns, torch.zeros(len(columns), device=self.device), size=(len(lengths), width)
        )
        rows = self._index([row for row, _ in decodes])
        return DecodePlan(rows, pattern, columns, bounds[:-1], places, longest)

    # -- the ops --------------------------------------------------------------------------------------

    def embed(self, inputs: StepInputs, table: Tensor) -> Tensor:
        """Rows of the embedding table [vocabulary, hidden] -> [rows, hidden]."""
        return F.embedding(inputs.token_ids, table)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """X / sqrt(mean(x^2) + epsilon) * weight over the last axis (arXiv:1910.07467)."""
        return F.rms_norm(x, (x.shape[-1],), weight, epsilon)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """[rows, in] x [out, in] -> [rows, out]."""
        return F.linear(x, weight)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual connection."""
        return x + y

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """SwiGLU's gate (arXiv:2002.05202): [rows, 2 * n] -> silu(first half) * second half."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        """The same with GELU in its tanh form (arXiv:1606.08415) in place of SiLU."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

    def rotate_and_store(
        self, qkv: Tensor, rotary: Tensor, cache: LayerCache, inputs: StepInputs, num_heads: int
    ) -> Tensor:
        """Rotate queries and keys by their row's position; write keys and values to their slots.

        qkv is [rows, (heads + 2 * kv_heads) * head_dim], rotary [positions, 2, head_dim / 2] holds
        cosines and sines. Gives the rotated queries [rows, heads, head_dim] in the cache's type.
        Pairs are (i, i + head_dim / 2), as in transformers' Llama.
        """
        kv_heads, head_dim = cache.keys.shape[2:]
        heads = qkv.view(len(qkv), -1, head_dim).to(torch.float32)
        query, key, value = torch.split(heads, [num_heads, kv_heads, kv_heads], dim=1)
        cosine, sine = rotary[inputs.positions].unsqueeze(2).unbind(1)  # [rows, 1, head_dim / 2] each
        cache.key_slots[inputs.slots] = _rotate(key, cosine, sine).to(cache.keys.dtype)
        cache.value_slots[inputs.slots] = value.to(cache.values.dtype)
        return _rotate(query, cosine, sine).to(cache.keys.dtype)

    def attention(self, query: Tensor, cache: LayerCache, inputs: StepInputs, window: int | None) -> Tensor:
        """Causal attention over the paged cache: [rows, heads, head_dim] -> [rows, heads * head_dim]."""
        assert isinstance(inputs, TorchInputs)
        assert inputs.window == window
        out = torch.empty_like(query)
        if inputs.decode is not None:
            out[inputs.decode.rows] = self._decode(query[inputs.decode.rows], cache, inputs.decode)
        for plan in inputs.prefills:
            out[plan.rows] = self._prefill(query[plan.rows], cache, plan)
        return out.flatten(1).to(self.dtype)

    def select(self, x: Tensor, rows: list[int]) -> Tensor:
        """Rows by index."""
        return x[rows]

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """[rows, hidden] x [vocabulary, hidden] -> [rows, vocabulary] in float32."""
        return F.linear(x, weight).to(torch.float32)

    # -- attention ------------------------------------------------------------------------------------

    def _decode(self, query: Tensor, cache: LayerCache, plan: DecodePlan) -> Tensor:
        head_dim = query.shape[-1]
        flat_query = query.flatten(0, 1)  # [sequences * heads, head_dim]
        keys = cache.key_slots.flatten(0, 1)[: plan.pattern.shape[1]]  # [slots * kv_heads, head_dim]
        scores = torch.sparse.sampled_addmm(
            plan.pattern, flat_query, keys.t(), beta=0.0, alpha=1 / math.sqrt(head_dim)
        ).values()
        if plan.places is None:
            weights = scores.view(len(flat_query), plan.longest).softmax(-1).flatten()
        else:
            square = scores.new_full((len(flat_query) * plan.longest,), -math.inf)
            square[plan.places] = scores
            weights = square.view(len(flat_query), plan.longest).softmax(-1).flatten()[plan.places]
        out = F.embedding_bag(
            plan.columns,
            cache.value_slots.flatten(0, 1),
            offsets=plan.starts,
            per_sample_weights=weights,
            mode="sum",
        )
        return out.view_as(query)

    def _prefill(self, query: Tensor, cache: LayerCache, plan: PrefillPlan) -> Tensor:
        # Gathering the context costs little beside the chunk's own rows, and is only done for chunks.
        keys = cache.key_slots[plan.slots].transpose(0, 1)  # [kv_heads, context, head_dim]
        values = cache.value_slots[plan.slots].transpose(0, 1)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=plan.mask,
            is_causal=plan.mask is None,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)


def _first_visible(chunk: Chunk, window: int | None) -> int:
    """The first position that the chunk's first row sees."""
    return 0 if window is None else max(0, chunk.start + 1 - window)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of each head by their angles (arXiv:2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

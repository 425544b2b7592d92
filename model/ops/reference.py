"""The op set in plain torch: the reference on any device, and what serves where nothing faster is built.

Knows about rows, slots and weights; not about layers, requests or sampling. The attention reads the
cache where it lies: a decode step copies no key and no value.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model import memory
from model.batch import Batch
from model.config import ExpertsConfig
from model.kv_cache import CacheLayout, LayerCache
from model.ops.base import LowRank, QueryKeyNorm
from model.ops.layout import BatchLayout, DecodePlan, PrefillPlan, StepInputs, TorchInputs
from model.weights.stored import StoredTensor

NUMBERS_AT_ONCE = 1 << 20
"""That are decoded on their way into the weights: what loading takes beside the model."""


@dataclass(frozen=True, slots=True)
class TorchAdapters:
    """The pairs of one product."""

    pairs: tuple[LowRank, ...]

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs)


class TorchOps:
    """The ops (see base.py) on tensors [rows, features] in the weights' type."""

    name = "torch"
    exact_rows = False
    block_size = 16

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        # The sparse product exists in single precision only; scores in bfloat16 would be no faster.
        self.cache_dtype = torch.float32
        self.layout = BatchLayout(device, self.block_size)
        with warnings.catch_warnings():  # torch says once that CSR tensors are beta: not news to our users
            warnings.simplefilter("ignore", UserWarning)
            torch.sparse_csr_tensor([0], [], [], size=(0, 0))

    # -- weights and cache ----------------------------------------------------------------------------

    def matrix(self, outputs: int, inputs: int) -> Tensor:
        """Allocate a matrix."""
        return memory.zeros((outputs, inputs), self.dtype, self.device)

    def vector(self, size: int) -> Tensor:
        """Allocate a norm's weight."""
        return torch.empty(size, dtype=self.dtype, device=self.device)

    def router(self, experts: int, inputs: int) -> Tensor:
        """A matrix."""
        return self.matrix(experts, inputs)

    def split(self, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """Views of a matrix."""
        return torch.split(weight, list(sizes))

    def shape(self, weight: Tensor) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(weight.shape)

    def weight_bytes(self, weight: Tensor, stored: StoredTensor) -> int:
        """The numbers in the weights' type."""
        return weight.nbytes

    def fill(self, weight: Tensor, stored: StoredTensor) -> None:
        """Copy the numbers, rounded to the weights' type."""
        for start, part in stored.in_parts(NUMBERS_AT_ONCE):
            numbers = part.dequantise()
            weight[start : start + len(numbers)] = numbers

    def adapters(self, pairs: Sequence[LowRank]) -> TorchAdapters:
        """In the weights' type."""
        return TorchAdapters(
            tuple(
                replace(pair, a=pair.a.to(self.device, self.dtype), b=pair.b.to(self.device, self.dtype))
                for pair in pairs
            )
        )

    def cache_layout(self, kv_heads: int, head_dim: int) -> CacheLayout:
        """Keys and values alike: token by token."""
        shape = (self.block_size, kv_heads, head_dim)
        return CacheLayout(self.block_size, shape, shape, self.cache_dtype, self.device)

    # -- what a pass shares ---------------------------------------------------------------------------

    def prepare(
        self, batch: Batch, num_heads: int, num_kv_heads: int, windows: Sequence[int | None] = (None,)
    ) -> StepInputs:
        """Lay a batch out as tensors; rows in the order of its chunks, windows in that of groups."""
        return self.layout.inputs(batch, num_heads, num_kv_heads, windows)

    # -- the ops --------------------------------------------------------------------------------------

    def embed(self, inputs: StepInputs, table: Tensor, multiplier: float = 1.0) -> Tensor:
        """Rows of the embedding table [vocabulary, hidden] -> [rows, hidden]."""
        rows = F.embedding(inputs.token_ids, table)
        return rows if multiplier == 1 else rows * multiplier

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """X / sqrt(mean(x^2) + epsilon) * weight over the last axis (arXiv:1910.07467)."""
        return F.rms_norm(x, (x.shape[-1],), weight, epsilon)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[rows, in] x [out, in] + [out] -> [rows, out]."""
        return F.linear(x, weight, bias)

    def low_rank(self, y: Tensor, x: Tensor, adapters: TorchAdapters, inputs: StepInputs) -> Tensor:
        """Adapter by adapter, the rows that ask for it; y is written over."""
        for pair in adapters.pairs:
            rows = inputs.adapted.get(pair.adapter)
            if rows is not None:
                part = y[:, pair.first : pair.first + len(pair.b)]
                part[rows] += F.linear(F.linear(x[rows], pair.a), pair.b)
        return y

    def add(self, x: Tensor, y: Tensor, multiplier: float = 1.0) -> Tensor:
        """The residual connection."""
        return torch.add(x, y, alpha=multiplier)

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """[rows, 2 * n] -> activation(first half) * second half (arXiv:2002.05202)."""
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    def experts(
        self,
        x: Tensor,
        router: Tensor,
        gate_ups: Sequence[Tensor],
        downs: Sequence[Tensor],
        config: ExpertsConfig,
        activation: str,
    ) -> Tensor:
        """Expert by expert, the rows that chose it."""
        # A stable sort takes the lower index of equals, which topk does not promise.
        shares, chosen = F.linear(x, router).float().softmax(-1).sort(dim=-1, descending=True, stable=True)
        shares, chosen = shares[:, : config.per_token], chosen[:, : config.per_token]
        if config.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(x, dtype=torch.float32)
        for index in sorted(set(chosen.flatten().tolist())):
            rows, rank = (chosen == index).nonzero(as_tuple=True)
            y = F.linear(self.gated(F.linear(x[rows], gate_ups[index]), activation), downs[index])
            out.index_add_(0, rows, y.float() * shares[rows, rank, None])
        return out.to(x.dtype)

    def rotate_and_store(
        self,
        qkv: Tensor,
        rotary: Tensor | None,
        cache: LayerCache,
        inputs: StepInputs,
        num_heads: int,
        scale: float,
        *,
        norm: QueryKeyNorm | None = None,
    ) -> Tensor:
        """Norm and rotate queries and keys; write keys and values to their slots.

        qkv is [rows, (heads + 2 * kv_heads) * head_dim], rotary [positions, 2, head_dim / 2] holds
        cosines and sines. Gives the queries [rows, heads, head_dim], scaled, in the cache's type.
        Pairs are (i, i + head_dim / 2), as in transformers' Llama.
        """
        kv_heads, head_dim = cache.keys.shape[2:]
        heads = qkv.view(len(qkv), -1, head_dim).to(torch.float32)
        query, key, value = torch.split(heads, [num_heads, kv_heads, kv_heads], dim=1)
        if norm is not None:
            query = _normed(query, norm.query, norm.epsilon)
            key = _normed(key, norm.key, norm.epsilon)
        if rotary is not None:
            cosine, sine = rotary[inputs.positions].unsqueeze(2).unbind(1)  # [rows, 1, head_dim / 2] each
            query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
        slots = inputs.slots[cache.group]
        cache.key_slots[slots] = key.to(cache.keys.dtype)
        cache.value_slots[slots] = value.to(cache.values.dtype)
        return (query * scale).to(cache.keys.dtype)

    def narrow(self, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """All of them: the attention is planned for all."""
        return x, query

    def attention(self, query: Tensor, cache: LayerCache, inputs: StepInputs, window: int | None) -> Tensor:
        """Causal attention over the paged cache: [rows, heads, head_dim] -> [rows, heads * head_dim]."""
        assert isinstance(inputs, TorchInputs)
        plans = inputs.plans[window]
        out = torch.empty_like(query)
        if plans.decode is not None:
            out[plans.decode.rows] = self._decode(query[plans.decode.rows], cache, plans.decode)
        for plan in plans.prefills:
            out[plan.rows] = self._prefill(query[plan.rows], cache, plan)
        return out.flatten(1).to(self.dtype)

    def select(self, x: Tensor, rows: list[int]) -> Tensor:
        """Rows by index."""
        return x[rows]

    def logits(self, x: Tensor, weight: Tensor, multiplier: float = 1.0) -> Tensor:
        """[rows, hidden] x [vocabulary, hidden] -> [rows, vocabulary] in float32."""
        logits = F.linear(x, weight).to(torch.float32)
        return logits if multiplier == 1 else logits * multiplier

    # -- attention ------------------------------------------------------------------------------------

    def _decode(self, query: Tensor, cache: LayerCache, plan: DecodePlan) -> Tensor:
        flat_query = query.flatten(0, 1)  # [sequences * heads, head_dim]
        keys = cache.key_slots.flatten(0, 1)[: plan.pattern.shape[1]]  # [slots * kv_heads, head_dim]
        scores = torch.sparse.sampled_addmm(plan.pattern, flat_query, keys.t(), beta=0.0).values()
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
            scale=1.0,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)


def _normed(heads: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm of [rows, heads, head_dim], head by head or over all of them, as wide as the weight is."""
    spans = heads.reshape(len(heads), -1, len(weight))
    return F.rms_norm(spans, (len(weight),), weight.to(heads.dtype), epsilon).view_as(heads)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of each head by their angles (arXiv:2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

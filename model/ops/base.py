"""What an op set offers: the ten or so ops that the model is written against, and its forms of weights.

What flows between ops is opaque to the model: tensors under the torch ops, buffers of a workspace
while the native ops record. Row i of every result depends on row i of the operands only; attention alone
looks further, at the cached keys and values of row i's own sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from model.config import ExpertsConfig
from model.kv_cache import CacheLayout, LayerCache
from model.weights.stored import StoredTensor

Activations: TypeAlias = Any
Weight: TypeAlias = Any
Adapters: TypeAlias = Any
"""The low-rank pairs of one product in an op set's form; it has `num_bytes`, what they take."""
Inputs: TypeAlias = Any
"""What all layers of a pass share: positions, block tables, which row belongs to which sequence."""


@dataclass(frozen=True, slots=True)
class QueryKeyNorm:
    """RMS norms of queries and keys; a weight of a head's width norms each head, else all together."""

    query: Weight
    key: Weight
    epsilon: float


@dataclass(frozen=True, slots=True)
class LowRank:
    """What one adapter adds to some outputs of a product with x: B (A x) (LoRA, arXiv:2106.09685)."""

    adapter: int
    """Its number, from 1."""
    first: int
    """Of the outputs that it changes."""
    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [outputs, rank], with the adapter's scale in it


class Ops(Protocol):
    """One way of computing; chosen once, at start."""

    name: str
    device: torch.device
    dtype: torch.dtype
    """Of plain weights."""
    exact_rows: bool
    """Whether a row has the same bits whatever is computed beside it; else it is only near to them."""

    def matrix(self, outputs: int, inputs: int) -> Weight:
        """Make room for a matrix; a loader fills it, or each of its `split` parts."""

    def vector(self, size: int) -> Weight:
        """Make room for a norm's weight, or a bias."""

    def router(self, experts: int, inputs: int) -> Weight:
        """Make room for the matrix that chooses experts."""

    def split(self, weight: Weight, sizes: Sequence[int]) -> tuple[Weight, ...]:
        """Parts of a matrix by its outputs, or of a vector, each to be filled on its own."""

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """What a stored tensor must have to fill the weight."""

    def weight_bytes(self, weight: Weight, stored: StoredTensor) -> int:
        """Memory that a weight takes once a stored tensor has filled it."""

    def fill(self, weight: Weight, stored: StoredTensor) -> None:
        """Take a stored tensor of the same shape over, in the ops' form (ValueError if they have none)."""

    def adapters(self, pairs: Sequence[LowRank]) -> Adapters:
        """The pairs of one product in the ops' form (ValueError for numbers that it does not hold)."""

    def cache_layout(self, kv_heads: int, head_dim: int) -> CacheLayout:
        """How the attention wants keys and values."""

    def embed(self, inputs: Inputs, table: Weight, multiplier: float = 1.0) -> Activations:
        """Rows of the embedding table [vocabulary, hidden], times the multiplier -> [rows, hidden]."""

    def rms_norm(self, x: Activations, weight: Weight, epsilon: float) -> Activations:
        """X / sqrt(mean(x^2) + epsilon) * weight over the last axis (arXiv:1910.07467)."""

    def linear(self, x: Activations, weight: Weight, bias: Weight | None = None) -> Activations:
        """[rows, in] x [out, in] + [out] -> [rows, out]."""

    def low_rank(self, y: Activations, x: Activations, adapters: Adapters, inputs: Inputs) -> Activations:
        """Add its adapter's pairs to each row of a product y of x; a row without one keeps its bits."""

    def add(self, x: Activations, y: Activations, multiplier: float = 1.0) -> Activations:
        """The residual connection, x + multiplier * y; x may be written over."""

    def gated(self, gate_up: Activations, activation: str) -> Activations:
        """[rows, 2 * n] -> activation(first half) * second half (arXiv:2002.05202).

        The activation is `silu`, or `gelu_tanh`: GELU in its tanh form (arXiv:1606.08415).
        """

    def experts(
        self,
        x: Activations,
        router: Weight,
        gate_ups: Sequence[Weight],
        downs: Sequence[Weight],
        config: ExpertsConfig,
        activation: str,
    ) -> Activations:
        """Each row's most probable experts, weighted by the router's softmax over all -> [rows, hidden].

        Only the chosen ones are computed, the rows of an expert together; of equally probable ones the
        lower index is taken.
        """

    def rotate_and_store(
        self,
        qkv: Activations,
        rotary: torch.Tensor | None,
        cache: LayerCache,
        inputs: Inputs,
        num_heads: int,
        scale: float,
        *,
        norm: QueryKeyNorm | None = None,
    ) -> Activations:
        """Norm queries and keys, rotate them by their row's position; write keys and values to their slots.

        qkv is [rows, (heads + 2 * kv_heads) * head_dim], rotary [positions, 2, head_dim / 2] holds
        cosines and sines, None rotates nothing. Pairs are (i, i + head_dim / 2), as in transformers' Llama.
        Gives the queries, multiplied by `scale`.
        """

    def narrow(self, x: Activations, query: Activations) -> tuple[Activations, Activations]:
        """Once the last keys and values are stored: the residual stream and queries of the rows that go on.

        They may be those alone whose logits are wanted.
        """

    def attention(
        self, query: Activations, cache: LayerCache, inputs: Inputs, window: int | None
    ) -> Activations:
        """Causal grouped attention of scaled queries over the paged cache -> [rows, heads * head_dim].

        With a window a row sees so many positions, its own included (arXiv:2310.06825); without, all of them.
        """

    def select(self, x: Activations, rows: Inputs) -> Activations:
        """The rows whose logits are wanted."""

    def logits(self, x: Activations, weight: Weight, multiplier: float = 1.0) -> Activations:
        """[rows, hidden] x [vocabulary, hidden], times the multiplier -> [rows, vocabulary] in float32."""

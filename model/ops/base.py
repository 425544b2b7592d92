"""What an op set offers: the ten or so ops that the model is written against, and its forms of weights.

What flows between ops is opaque to the model: tensors under the torch ops, buffers of a workspace
while the native ops record. Row i of every result depends on row i of the operands only; attention alone
looks further, at the cached keys and values of row i's own sequence.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch

from model.kv_cache import CacheLayout, LayerCache
from model.weights.stored import StoredTensor

Activations: TypeAlias = Any
Weight: TypeAlias = Any
Inputs: TypeAlias = Any
"""What all layers of a pass share: positions, block tables, which row belongs to which sequence."""


class Ops(Protocol):
    """One way of computing; chosen once, at start."""

    name: str
    device: torch.device
    dtype: torch.dtype
    """Of plain weights."""

    def matrix(self, outputs: int, inputs: int) -> Weight:
        """Make room for a matrix; a loader fills it, or each of its `split` parts."""

    def vector(self, size: int) -> Weight:
        """Make room for a norm's weight."""

    def split(self, weight: Weight, sizes: Sequence[int]) -> tuple[Weight, ...]:
        """Parts of a matrix by its outputs, each to be filled on its own."""

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """What a stored tensor must have to fill the weight."""

    def fill(self, weight: Weight, stored: StoredTensor) -> None:
        """Take a stored tensor of the same shape over, in the ops' form (ValueError if they have none)."""

    def cache_layout(self, kv_heads: int, head_dim: int) -> CacheLayout:
        """How the attention wants keys and values."""

    def embed(self, inputs: Inputs, table: Weight) -> Activations:
        """Rows of the embedding table [vocabulary, hidden] -> [rows, hidden]."""

    def rms_norm(self, x: Activations, weight: Weight, epsilon: float) -> Activations:
        """X / sqrt(mean(x^2) + epsilon) * weight over the last axis (arXiv:1910.07467)."""

    def linear(self, x: Activations, weight: Weight) -> Activations:
        """[rows, in] x [out, in] -> [rows, out]."""

    def add(self, x: Activations, y: Activations) -> Activations:
        """The residual connection; x may be written over."""

    def silu_mul(self, gate_up: Activations) -> Activations:
        """SwiGLU's gate (arXiv:2002.05202): [rows, 2 * n] -> silu(first half) * second half."""

    def gelu_mul(self, gate_up: Activations) -> Activations:
        """The same with GELU in its tanh form (arXiv:1606.08415) in place of SiLU."""

    def rotate_and_store(
        self, qkv: Activations, rotary: torch.Tensor, cache: LayerCache, inputs: Inputs, num_heads: int
    ) -> Activations:
        """Rotate queries and keys by their row's position; write keys and values to their slots.

        qkv is [rows, (heads + 2 * kv_heads) * head_dim], rotary [positions, 2, head_dim / 2] holds
        cosines and sines. Pairs are (i, i + head_dim / 2), as in transformers' Llama. Gives the queries.
        """

    def attention(
        self, query: Activations, cache: LayerCache, inputs: Inputs, window: int | None
    ) -> Activations:
        """Causal grouped attention over the paged cache -> [rows, heads * head_dim].

        With a window a row sees so many positions, its own included (arXiv:2310.06825); without, all of them.
        """

    def select(self, x: Activations, rows: Inputs) -> Activations:
        """The rows whose logits are wanted."""

    def logits(self, x: Activations, weight: Weight) -> Activations:
        """[rows, hidden] x [vocabulary, hidden] -> [rows, vocabulary] in float32."""

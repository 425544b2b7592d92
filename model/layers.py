"""The parts of a decoder layer, as the paper has them, written against the op set alone.

What flows between ops is the op set's own; a layer only names weights and the order of operations.
A part allocates its weights and offers them by name, fused ones in slices, for the loader to fill.
"""

from collections.abc import Iterator

from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import LayerCache
from model.ops.base import Activations, Inputs, Ops, Weight

Parameters = Iterator[tuple[str, Weight]]


class Attention:
    """Grouped-query attention (arXiv:2305.13245) with rotary positions over a paged cache."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        self.ops = ops
        self.num_heads = config.num_heads
        self.query_size = config.num_heads * config.head_dim
        self.kv_size = config.num_kv_heads * config.head_dim
        self.qkv = ops.matrix(self.query_size + 2 * self.kv_size, config.hidden_size)
        self.output = ops.matrix(config.hidden_size, self.query_size)
        self.window = config.sliding_window

    def parameters(self) -> Parameters:
        """Weights by name; query, key and value are slices of one matrix."""
        query, key, value = self.ops.split(self.qkv, (self.query_size, self.kv_size, self.kv_size))
        yield from (("query", query), ("key", key), ("value", value), ("output", self.output))

    def forward(self, x: Activations, rotary: Tensor, cache: LayerCache, inputs: Inputs) -> Activations:
        """[rows, hidden] -> [rows, hidden]; writes the rows' keys and values into the cache first."""
        qkv = self.ops.linear(x, self.qkv)
        query = self.ops.rotate_and_store(qkv, rotary, cache, inputs, self.num_heads)
        return self.ops.linear(self.ops.attention(query, cache, inputs, self.window), self.output)


class MLP:
    """The gated feed-forward network (arXiv:2002.05202): SwiGLU, or GEGLU."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        self.ops = ops
        self.size = config.intermediate_size
        self.gate = ops.silu_mul if config.hidden_act == "silu" else ops.gelu_mul
        self.gate_up = ops.matrix(2 * config.intermediate_size, config.hidden_size)
        self.down = ops.matrix(config.hidden_size, config.intermediate_size)

    def parameters(self) -> Parameters:
        """Weights by name; gate and up are halves of one matrix."""
        gate, up = self.ops.split(self.gate_up, (self.size, self.size))
        yield from (("gate", gate), ("up", up), ("down", self.down))

    def forward(self, x: Activations) -> Activations:
        """[rows, hidden] -> [rows, hidden]."""
        return self.ops.linear(self.gate(self.ops.linear(x, self.gate_up)), self.down)


class DecoderLayer:
    """Pre-norm attention and feed-forward network, each added to the residual stream."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        self.ops = ops
        self.epsilon = config.norm_eps
        self.attention = Attention(config, ops)
        self.mlp = MLP(config, ops)
        self.attention_norm = ops.vector(config.hidden_size)
        self.mlp_norm = ops.vector(config.hidden_size)

    def parameters(self) -> Parameters:
        """Weights by name."""
        yield from (("attention_norm", self.attention_norm), ("mlp_norm", self.mlp_norm))
        yield from ((f"attention.{name}", weight) for name, weight in self.attention.parameters())
        yield from ((f"mlp.{name}", weight) for name, weight in self.mlp.parameters())

    def forward(self, x: Activations, rotary: Tensor, cache: LayerCache, inputs: Inputs) -> Activations:
        """[rows, hidden] -> [rows, hidden]."""
        normed = self.ops.rms_norm(x, self.attention_norm, self.epsilon)
        x = self.ops.add(x, self.attention.forward(normed, rotary, cache, inputs))
        normed = self.ops.rms_norm(x, self.mlp_norm, self.epsilon)
        return self.ops.add(x, self.mlp.forward(normed))

"""ModelConfig: the numbers and flags of one model, whatever program wrote its checkpoint.

The foreign dialects are read in `model/dialects` and nowhere else. What cannot be served is refused there by
file and field, so a config that exists is consistent.
"""

from dataclasses import dataclass
from typing import Literal

from model.rope import Rope

ACTIVATIONS = ("silu", "gelu_tanh")
DTYPES = ("float32", "float16", "bfloat16")

Block = Literal["pre_norm", "post_norm", "sandwich"]
"""Where a layer has its norms: before attention and MLP, after them (OLMo 2), or both (Gemma 3)."""


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer."""

    rope: Rope | None
    """How its queries and keys are rotated; None: not at all (arXiv:2501.18795)."""
    window: int | None = None
    """Positions that its attention sees, its own included; None: all before it."""
    experts: bool = False
    """Whether its feed-forward network is the mixture of experts."""

    def __post_init__(self) -> None:
        assert self.window is None or self.window >= 1


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that need the keys and values of the same positions, and so share block tables."""

    window: int | None
    layers: tuple[int, ...]
    """Their indices."""


def most_blocks(window: int | None, num_tokens: int, most_rows: int, block_size: int) -> int:
    """Cache blocks that a sequence of so many tokens holds at once, if no step computes more rows of it.

    With a window those of the last row before a step and of the step's rows, wherever a block begins.
    """
    whole = -(-num_tokens // block_size)
    return whole if window is None else min(whole, -(-(window + most_rows) // block_size) + 1)


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of experts: a softmax over all of them, the best few of it, weighted by it."""

    count: int
    per_token: int
    """So many are computed for a token, the most probable ones."""
    intermediate_size: int
    """Width of each."""
    normalised: bool
    """Whether the weights of the chosen ones are scaled to a sum of one."""
    num_shared: int = 0
    """Networks beside them that every token takes, unweighted (arXiv:2401.06066)."""
    shared_intermediate_size: int = 0
    """Width of each of those."""

    def __post_init__(self) -> None:
        assert 1 <= self.per_token <= self.count
        assert (self.num_shared > 0) == (self.shared_intermediate_size > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What one model is, in transformers' words; every number is positive and fits the others."""

    architecture: str
    """The family, as its checkpoint names it."""
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    num_heads: int
    """Query heads; each group of num_heads / num_kv_heads shares one key and value head."""
    num_kv_heads: int
    head_dim: int
    """Width of a head, even (rotary pairs); num_heads * head_dim may differ from hidden_size."""
    intermediate_size: int
    hidden_act: str
    """The gate's activation: `silu`, or `gelu_tanh`."""
    norm_eps: float
    max_position_embeddings: int
    """Longest sequence in tokens."""
    tie_embeddings: bool
    """Whether the output projection is the embedding; then the model has no parameter `output`."""
    dtype: str
    """The checkpoint's own: float32, float16 or bfloat16; quantised weights count as float16."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Each of them ends a generation; may be empty."""
    block: Block = "pre_norm"
    qkv_bias: bool = False
    output_bias: bool = False
    """Whether attention's output projection has a bias."""
    query_key_norm: Literal["head", "width"] | None = None
    """RMS norm of queries and keys before their rotation: of each head, or over all together (OLMo 2)."""
    experts: ExpertsConfig | None = None
    attention_scale: float | None = None
    """Multiplies queries times keys; None: 1 / sqrt(head_dim)."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    """Multiplies what attention and feed-forward network add to the residual stream."""
    logits_multiplier: float = 1.0

    def __post_init__(self) -> None:
        assert self.layers
        assert self.dtype in DTYPES
        assert self.hidden_act in ACTIVATIONS
        assert self.num_heads % self.num_kv_heads == 0
        assert self.head_dim % 2 == 0
        assert all(layer.rope is None or layer.rope.dim <= self.head_dim for layer in self.layers)
        assert self.experts is not None or not any(layer.experts for layer in self.layers)

    @property
    def num_layers(self) -> int:
        """How many there are."""
        return len(self.layers)

    @property
    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """The layers by window, none and the longest first."""
        layers: dict[int | None, list[int]] = {}
        for index, layer in enumerate(self.layers):
            layers.setdefault(layer.window, []).append(index)
        windows = sorted(layers, key=lambda window: (window is not None, -(window or 0)))
        return tuple(CacheGroup(window, tuple(layers[window])) for window in windows)

    @property
    def query_scale(self) -> float:
        """What queries are multiplied with."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

"""ModelConfig: the numbers and flags of one model, whatever program wrote its checkpoint.

The foreign dialects (transformers' config.json old and new, GGUF metadata) are read here and nowhere else.
What cannot be served is refused by file and field, so a config that exists is consistent. Nothing that a
checkpoint names is ever imported: `auto_map` and the like are data that nobody reads.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from model.errors import ModelError

# Far above any published model, far below what would hurt: a number beyond is a corrupt or a hostile file.
_MOST_VOCABULARY = 1 << 24
_MOST_WIDTH = 1 << 20
_MOST_LAYERS = 1 << 12
_MOST_HEADS = 1 << 12  # and the most that one is wide
_MOST_POSITIONS = 1 << 28
_MOST_FREQUENCY_BASE = 1e15

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names that are served -> ours."""

_DTYPES = ("float32", "float16", "bfloat16")

# Fields that change the arithmetic in a way that is not implemented: absent, or at the value without effect.
_HF_NEUTRAL: Mapping[str, object] = {
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "partial_rotary_factor": 1,
}
_GGUF_NEUTRAL: Mapping[str, object] = {
    "expert_count": 0,
    "rope.scaling.type": "none",
    "rope.scale_linear": 1,
    "attention.causal": True,
}


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies.

    The formula is `apply_scaling` in meta-llama's llama-models, `rope_type: llama3` in transformers.
    """

    factor: float
    """Divides the frequencies of wavelengths above original_max_position_embeddings / low_freq_factor."""
    low_freq_factor: float
    high_freq_factor: float
    """Wavelengths below original_max_position_embeddings / high_freq_factor keep their frequency."""
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        assert self.factor >= 1
        assert 0 < self.low_freq_factor < self.high_freq_factor


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What one model is, in transformers' words; every number is positive and fits the others."""

    architecture: str
    """`llama`, or `mistral`: the same with a window."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    """Query heads; each group of num_heads / num_kv_heads shares one key and value head."""
    num_kv_heads: int
    head_dim: int
    """Width of a head, even (rotary pairs); num_heads * head_dim may differ from hidden_size."""
    intermediate_size: int
    hidden_act: str
    """The gate's activation: `silu`, or `gelu_tanh`."""
    sliding_window: int | None
    """Positions that attention sees, its own included; None: all before it."""
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    rope_factors: tuple[float, ...] | None
    """head_dim / 2 divisors of the rotary frequencies, where a GGUF states them (`rope_freqs.weight`)."""
    max_position_embeddings: int
    """Longest sequence in tokens."""
    tie_embeddings: bool
    """Whether the output projection is the embedding; then the checkpoint has no tensor `output`."""
    dtype: str
    """The checkpoint's own: float32, float16 or bfloat16; quantised weights count as float16."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Each of them ends a generation; may be empty."""

    def __post_init__(self) -> None:
        assert self.dtype in _DTYPES
        assert self.hidden_act in _ACTIVATIONS.values()
        assert self.sliding_window is None or self.sliding_window >= 1
        assert self.num_heads % self.num_kv_heads == 0
        assert self.head_dim % 2 == 0
        assert self.rope_factors is None or len(self.rope_factors) == self.head_dim // 2


@dataclass(frozen=True, slots=True)
class _Fields:
    """A foreign mapping with typed and bounded access; null counts as absent, a refusal names the field."""

    values: Mapping[str, object]
    where: str
    prefix: str = ""

    def get(self, name: str) -> object:
        return self.values.get(self.prefix + name)

    def refusal(self, name: str, wanted: str) -> ModelError:
        value = self.get(name)
        if value is None:
            return ModelError(f"{self.where}: field {self.prefix}{name} is missing, it must be {wanted}")
        return ModelError(f"{self.where}: field {self.prefix}{name} is {_shown(value)}, it must be {wanted}")

    def count(self, name: str, most: int, default: int | None = None) -> int:
        """Return a whole number from 1 to `most`."""
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.refusal(name, f"a whole number from 1 to {most}")
        return value

    def number(self, name: str, least: float, most: float, default: float | None = None) -> float:
        """Return a finite number from `least` to `most`."""
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
            raise self.refusal(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, bool):
            raise self.refusal(name, "true or false")
        return value

    def word(self, name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, str) or value not in allowed:
            raise self.refusal(name, f"{' or '.join(allowed)} (nothing else is served)")
        return value

    def neutral(self, table: Mapping[str, object]) -> None:
        """Refuse fields that would change the arithmetic."""
        for name, value in table.items():
            if self.get(name) is not None and self.get(name) != value:
                raise self.refusal(name, f"{_shown(value)} or absent (nothing else is served)")

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Return the ids of a field that holds an id, a list of ids or nothing; repeated ids count once."""
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for id in ids:
            if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < vocab_size:
                raise self.refusal(name, f"made of token ids from 0 to {vocab_size - 1}")
        return tuple(dict.fromkeys(ids))


def from_hf(
    config: Mapping[str, object], generation_config: Mapping[str, object] | None, where: str
) -> ModelConfig:
    """Read transformers' config.json and, where there is one, generation_config.json, of any version.

    Ids of end tokens are generation_config's if it names any, else config's, as in transformers' generate.
    Absent fields have transformers' defaults where old files omit them (key-value heads, head_dim, rope
    theta, activation, tying, biases, dtype); the others are required. `where` names the file in messages.
    Raises ModelError if the model is not Llama-type or a field is missing, malformed or contradictory.
    """
    fields = _Fields(config, where)
    architecture = fields.word("model_type", ("llama", "mistral"))
    fields.neutral(_HF_NEUTRAL)
    hidden_act = _ACTIVATIONS[fields.word("hidden_act", tuple(_ACTIVATIONS), "silu")]
    window = None
    if architecture == "mistral" and config.get("sliding_window") is not None:
        window = fields.count("sliding_window", _MOST_POSITIONS)
    vocab_size = fields.count("vocab_size", _MOST_VOCABULARY)
    hidden_size, num_heads, num_kv_heads, head_dim = _heads(
        fields, "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"
    )
    rope_theta, rope_scaling = _hf_rope(fields)
    generation = _Fields(generation_config or {}, f"{where} (generation_config)")
    eos_token_ids = generation.token_ids("eos_token_id", vocab_size)
    dtype = "dtype" if config.get("dtype") is not None else "torch_dtype"
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=fields.count("num_hidden_layers", _MOST_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.count("intermediate_size", _MOST_WIDTH),
        hidden_act=hidden_act,
        sliding_window=window,
        norm_eps=fields.number("rms_norm_eps", 1e-20, 0.1),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rope_factors=None,
        max_position_embeddings=fields.count("max_position_embeddings", _MOST_POSITIONS),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=fields.word(dtype, _DTYPES, "float32"),
        bos_token_id=next(iter(fields.token_ids("bos_token_id", vocab_size)), None),
        eos_token_ids=eos_token_ids or fields.token_ids("eos_token_id", vocab_size),
    )


def from_gguf(
    metadata: Mapping[str, object],
    where: str,
    *,
    tie_embeddings: bool = False,
    dtype: str = "float16",
    rope_factors: tuple[float, ...] | None = None,
) -> ModelConfig:
    """Read the metadata of a GGUF file: plain values by key, as `GgufCheckpoint.metadata` has them.

    The three keyword arguments are what a GGUF tells by its tensors and not by its metadata.
    Raises ModelError if the model is not Llama-type or a field is missing, malformed or contradictory.
    """
    general = _Fields(metadata, where)
    architecture = general.word("general.architecture", ("llama",))
    fields = _Fields(metadata, where, architecture + ".")
    fields.neutral(_GGUF_NEUTRAL)
    tokens = metadata.get("tokenizer.ggml.tokens")
    num_tokens = len(tokens) if isinstance(tokens, list) else 0
    vocab_size = fields.count("vocab_size", _MOST_VOCABULARY, num_tokens)
    if num_tokens > vocab_size:
        raise fields.refusal("vocab_size", f"at least the {num_tokens} of tokenizer.ggml.tokens")
    hidden_size, num_heads, num_kv_heads, head_dim = _heads(
        fields, "embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length"
    )
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.count(name, _MOST_HEADS, head_dim) != head_dim:
            raise fields.refusal(name, f"the head width {head_dim} (nothing else is served)")
    if rope_factors is not None and (
        len(rope_factors) != head_dim // 2 or not all(math.isfinite(f) and f > 0 for f in rope_factors)
    ):
        raise ModelError(f"{where}: tensor rope_freqs.weight must hold {head_dim // 2} positive numbers")
    # llama.cpp ends a generation at each of these: end of sequence, of turn and of message.
    ends = [general.token_ids(f"tokenizer.ggml.{end}_token_id", vocab_size) for end in ("eos", "eot", "eom")]
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=fields.count("block_count", _MOST_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.count("feed_forward_length", _MOST_WIDTH),
        hidden_act="silu",
        sliding_window=None,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-20, 0.1),
        rope_theta=fields.number("rope.freq_base", 1, _MOST_FREQUENCY_BASE, 10000.0),
        rope_scaling=None,
        rope_factors=rope_factors,
        max_position_embeddings=fields.count("context_length", _MOST_POSITIONS),
        tie_embeddings=tie_embeddings,
        dtype=dtype,
        bos_token_id=next(iter(general.token_ids("tokenizer.ggml.bos_token_id", vocab_size)), None),
        eos_token_ids=tuple(dict.fromkeys(id for ids in ends for id in ids)),
    )


def _hf_rope(fields: _Fields) -> tuple[float, Llama3RopeScaling | None]:
    """Rotary base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    rope = {} if fields.get(name) is None else fields.get(name)
    if not isinstance(rope, Mapping):
        raise fields.refusal(name, "an object or null")
    kind = "type" if rope.get("rope_type") is None else "rope_type"
    base = fields.get("rope_theta") if rope.get("rope_theta") is None else rope.get("rope_theta")
    rope_fields = _Fields({**rope, "rope_theta": base}, f"{fields.where} ({name})")
    rope_fields.neutral(_HF_NEUTRAL)
    theta = rope_fields.number("rope_theta", 1, _MOST_FREQUENCY_BASE, 10000.0)
    if rope_fields.word(kind, ("default", "llama3"), "default") == "default":
        return theta, None
    low = rope_fields.number("low_freq_factor", 1e-3, 1e6)
    high = rope_fields.number("high_freq_factor", 1e-3, 1e6)
    if low >= high:
        raise rope_fields.refusal("high_freq_factor", f"above low_freq_factor, which is {low:g}")
    original = "original_max_position_embeddings"
    return theta, Llama3RopeScaling(
        factor=rope_fields.number("factor", 1, 1e6),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=rope_fields.count(original, _MOST_POSITIONS),
    )


def _heads(fields: _Fields, hidden: str, heads: str, kv_heads: str, width: str) -> tuple[int, int, int, int]:
    """Return hidden size, heads, key-value heads and head width from fields of these names, if they fit."""
    hidden_size = fields.count(hidden, _MOST_WIDTH)
    num_heads = fields.count(heads, _MOST_HEADS)
    num_kv_heads = fields.count(kv_heads, _MOST_HEADS, num_heads)
    if num_heads % num_kv_heads:
        raise fields.refusal(heads, f"a multiple of {fields.prefix}{kv_heads}, which is {num_kv_heads}")
    if fields.get(width) is None and hidden_size % num_heads:
        raise fields.refusal(
            hidden, f"a multiple of {num_heads} heads, or {fields.prefix}{width} must be given"
        )
    head_dim = fields.count(width, _MOST_HEADS, hidden_size // num_heads)
    if head_dim % 2:
        raise ModelError(f"{fields.where}: head_dim is {head_dim}, but rotary embedding needs pairs")
    return hidden_size, num_heads, num_kv_heads, head_dim


def _shown(value: object) -> str:
    """Return a foreign value for a message: on one line and short."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    shown = ascii(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."

"""transformers' config.json, old and new, of every family that is served: one function each over `_decoder`.

Nothing that a checkpoint names is ever imported: `auto_map` and the like are data that nobody reads.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.config import DTYPES, ExpertsConfig, ModelConfig
from model.dialects.fields import MOST_EXPERTS, MOST_POSITIONS, MOST_VOCABULARY, MOST_WIDTH, Fields
from model.dialects.hf_layers import (
    Layers,
    above,
    counts,
    every,
    flagged,
    not_every,
    read_layers,
    read_layers_of_two_ropes,
    sparse,
)
from model.dialects.hf_rope import read_rope

_MOST_MULTIPLIER = 1e6

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names that are served -> ours."""

_NEUTRAL: Mapping[str, object] = {
    "mlp_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
"""Fields that change the arithmetic in a way that is not implemented: absent, or without effect."""


@dataclass(frozen=True, slots=True)
class _Family:
    """How the config of one model_type is read."""

    read: Callable[[Fields], ModelConfig]
    defaults: Mapping[str, object] = field(default_factory=dict)
    """transformers' own, where they are not `_decoder`'s; a null in the file wins over them."""
    neutral: Mapping[str, object] = field(default_factory=dict)
    """Beside _NEUTRAL."""


def from_hf(
    config: Mapping[str, object], generation_config: Mapping[str, object] | None, where: str
) -> ModelConfig:
    """Read transformers' config.json and, where there is one, generation_config.json, of any version.

    Ids of end tokens are generation_config's if it names any, else config's, as in transformers' generate.
    Absent fields have transformers' defaults where old files omit them (key-value heads, head_dim, rope
    theta, activation, tying, biases, dtype); the others are required. `where` names the file in messages.
    Raises ModelError if the family is not served or a field is missing, malformed or contradictory.
    """
    family = _FAMILIES[Fields(config, where).word("model_type", tuple(_FAMILIES))]
    fields = Fields({**family.defaults, **config}, where)
    fields.neutral(_NEUTRAL)
    fields.neutral(family.neutral)
    read = family.read(fields)
    generation = Fields(generation_config or {}, f"{where} (generation_config)")
    eos_token_ids = generation.token_ids("eos_token_id", read.vocab_size)
    return replace(read, eos_token_ids=eos_token_ids) if eos_token_ids else read


def _decoder(fields: Fields, layers: Layers, **differences: Any) -> ModelConfig:
    """Read the fields that all families share; `differences` are fields of ModelConfig that win over them."""
    vocab_size = fields.count("vocab_size", MOST_VOCABULARY)
    hidden_size, num_heads, num_kv_heads, head_dim = counts(fields)
    biased = fields.flag("attention_bias", False)
    shared: dict[str, Any] = {
        "architecture": fields.get("model_type"),
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "layers": layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": fields.count("intermediate_size", MOST_WIDTH),
        "hidden_act": _activation(fields, "hidden_act", "silu"),
        "norm_eps": fields.number("rms_norm_eps", 1e-20, 0.1),
        "max_position_embeddings": fields.count("max_position_embeddings", MOST_POSITIONS),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "dtype": fields.word("torch_dtype" if fields.get("dtype") is None else "dtype", DTYPES, "float32"),
        "bos_token_id": next(iter(fields.token_ids("bos_token_id", vocab_size)), None),
        "eos_token_ids": fields.token_ids("eos_token_id", vocab_size),
        "qkv_bias": biased,
        "output_bias": biased,
    }
    return ModelConfig(**(shared | differences))


def _activation(fields: Fields, name: str, default: str) -> str:
    return _ACTIVATIONS[fields.word(name, tuple(_ACTIVATIONS), default)]


def _multiplier(fields: Fields, name: str, default: float = 1.0) -> float:
    return fields.number(name, 1 / _MOST_MULTIPLIER, _MOST_MULTIPLIER, default)


def _llama(fields: Fields) -> ModelConfig:
    return _decoder(fields, read_layers(fields))


def _mistral(fields: Fields) -> ModelConfig:
    return _decoder(fields, read_layers(fields, sliding=every))


def _mixtral(fields: Fields) -> ModelConfig:
    count = fields.count("num_local_experts", MOST_EXPERTS)
    experts = ExpertsConfig(
        count=count,
        per_token=fields.count("num_experts_per_tok", count),
        intermediate_size=fields.count("intermediate_size", MOST_WIDTH),
        normalised=True,
    )
    return _decoder(fields, read_layers(fields, sliding=every, experts=every), experts=experts)


def _qwen2(fields: Fields) -> ModelConfig:
    layers = read_layers(fields, sliding=above(fields, "max_window_layers"))
    return _decoder(fields, layers, qkv_bias=True, output_bias=False)


def _qwen3(fields: Fields) -> ModelConfig:
    layers = read_layers(fields, sliding=above(fields, "max_window_layers"))
    return _decoder(fields, layers, query_key_norm="head")


def _qwen3_moe(fields: Fields) -> ModelConfig:
    # The old name, and the one that transformers 5 writes.
    name = "num_experts" if fields.get("num_local_experts") is None else "num_local_experts"
    count = fields.count(name, MOST_EXPERTS)
    experts = ExpertsConfig(
        count=count,
        per_token=fields.count("num_experts_per_tok", count),
        intermediate_size=fields.count("moe_intermediate_size", MOST_WIDTH),
        normalised=fields.flag("norm_topk_prob", False),
    )
    layers = read_layers(fields, sliding=every, experts=sparse(fields))
    return _decoder(fields, layers, query_key_norm="head", experts=experts)


def _smollm3(fields: Fields) -> ModelConfig:
    rotated = flagged(fields, "no_rope_layers", not_every(fields, "no_rope_layer_interval", 4))
    layers = read_layers(fields, sliding=lambda index: not rotated(index), rotated=rotated)
    return _decoder(fields, layers)


def _phi3(fields: Fields) -> ModelConfig:
    aliases = {"su": "longrope", "yarn": "longrope"}  # what the family's first checkpoints call it
    rope = read_rope(fields, counts(fields)[3], partial=True, aliases=aliases)
    return _decoder(fields, read_layers(fields, sliding=every, rope=rope))


def _granite(fields: Fields) -> ModelConfig:
    return _decoder(
        fields,
        read_layers(fields),
        embedding_multiplier=_multiplier(fields, "embedding_multiplier"),
        attention_scale=_multiplier(fields, "attention_multiplier"),
        residual_multiplier=_multiplier(fields, "residual_multiplier"),
        logits_multiplier=1 / _multiplier(fields, "logits_scaling"),
    )


def _olmo2(fields: Fields) -> ModelConfig:
    return _decoder(fields, read_layers(fields), block="post_norm", query_key_norm="width")


def _gemma3_text(fields: Fields) -> ModelConfig:
    sliding = not_every(fields, "sliding_window_pattern", 6)
    return _decoder(
        fields,
        read_layers_of_two_ropes(fields, sliding=sliding),
        block="sandwich",
        query_key_norm="head",
        hidden_act=_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        embedding_multiplier=math.sqrt(counts(fields)[0]),
        attention_scale=_multiplier(fields, "query_pre_attn_scalar") ** -0.5,
    )


def _gemma3(fields: Fields) -> ModelConfig:
    """Read the language model of one that sees."""
    text = fields.get("text_config")
    if not isinstance(text, Mapping):
        raise fields.refusal("text_config", "an object")
    Fields(text, f"{fields.where} (text_config)").word("model_type", ("gemma3_text",), "gemma3_text")
    own = ("tie_word_embeddings", "dtype", "torch_dtype", "bos_token_id", "eos_token_id")
    outer = {name: fields.get(name) for name in own if fields.get(name) is not None}
    inner = Fields({**_GEMMA3, **text, **outer, "model_type": "gemma3"}, f"{fields.where} (text_config)")
    inner.neutral(_NEUTRAL)
    return _gemma3_text(inner)


_WINDOWED_BY_LAYER: Mapping[str, object] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_NO_BIAS: Mapping[str, object] = {"attention_bias": False}
_GEMMA3: Mapping[str, object] = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}

_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(_llama),
    "mistral": _Family(_mistral, {"sliding_window": 4096}, _NO_BIAS),
    "mixtral": _Family(_mixtral, {"rope_theta": 1000000.0}, _NO_BIAS),
    "qwen2": _Family(_qwen2, _WINDOWED_BY_LAYER, {"attention_bias": True}),
    "qwen3": _Family(_qwen3, {"head_dim": 128, **_WINDOWED_BY_LAYER}),
    "qwen3_moe": _Family(_qwen3_moe, _WINDOWED_BY_LAYER),
    "smollm3": _Family(
        _smollm3, {"rope_theta": 2000000.0, "tie_word_embeddings": True, "use_sliding_window": False}
    ),
    "phi3": _Family(_phi3, {"original_max_position_embeddings": 4096}, _NO_BIAS),
    "granite": _Family(_granite),
    "olmo2": _Family(_olmo2),
    "gemma3_text": _Family(_gemma3_text, _GEMMA3),
    "gemma3": _Family(_gemma3),
}
"""By model_type."""

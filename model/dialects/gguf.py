"""GGUF's metadata -> ModelConfig, for the architectures of `FAMILIES`.

Keys are the `gguf` package's (`Keys`). What a file leaves unsaid llama.cpp has by architecture: `_Family`.
The names of the tensors are in `gguf_names.py`, rotary scaling in `gguf_rope.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from model.config import Block, ExpertsConfig, LayerConfig, ModelConfig
from model.dialects.fields import (
    MOST_FREQUENCY_BASE,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_VOCABULARY,
    MOST_WIDTH,
    Fields,
    head_counts,
)
from model.dialects.gguf_names import EMBEDDING, OUTPUT, OUTPUT_BIAS, QKV_BIAS, QUERY_BIAS
from model.dialects.gguf_rope import read_scaling
from model.errors import ModelError
from model.rope import Rope

_MOST_EXPERTS = 1 << 12
_MOST_SCALE = 1e6
_LAYERS_OF_GEMMA3_27B = 62
"""The one size whose queries are scaled by hidden size / heads; no key says so, llama.cpp goes by this."""


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture's files leave unsaid."""

    block: Block = "pre_norm"
    hidden_act: str = "silu"
    query_key_norm: Literal["head", "width"] | None = None
    scaled_embedding: bool = False
    """Whether embeddings are multiplied by the root of their width."""
    partial_rotary: bool = False
    """Whether a head may be rotated in part."""
    unrotated: int | None = None
    """Every so-many-th layer is not rotated."""
    unwindowed: int | None = None
    """Where there is a window, every so-many-th layer has none; None: they all have one."""
    window_theta: float | None = None
    """Rotary base of layers with a window, where it is another."""


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(),
    "qwen2": _Family(),
    "qwen3": _Family(query_key_norm="head"),
    "qwen3moe": _Family(query_key_norm="head"),
    "phi3": _Family(partial_rotary=True),
    "granite": _Family(),
    "olmo2": _Family(block="post_norm", query_key_norm="width", unwindowed=4),
    "gemma3": _Family(
        block="sandwich",
        hidden_act="gelu_tanh",
        query_key_norm="head",
        scaled_embedding=True,
        unwindowed=6,
        window_theta=10000.0,
    ),
    "smollm3": _Family(unrotated=4),
}

_NEUTRAL: Mapping[str, object] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.shared_kv_layers": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "expert_gating_func": 1,  # softmax
    "expert_group_count": 1,
    "expert_shared_count": 0,
    "expert_weights_scale": 1,
    "leading_dense_block_count": 0,
    "nextn_predict_layers": 0,
    "use_parallel_residual": False,
}
"""Keys that change the arithmetic in a way that is not implemented: absent, or without effect."""


def from_gguf(
    metadata: Mapping[str, object],
    where: str,
    *,
    tensors: Mapping[str, tuple[int, ...]] | None = None,
    factors: Mapping[str, tuple[float, ...]] | None = None,
    dtype: str = "float16",
) -> ModelConfig:
    """Read the metadata of a GGUF file: plain values by key, as `GgufFiles.metadata` has them.

    The keyword arguments are what a GGUF tells by its tensors and not by its metadata: their shapes by name,
    the numbers of those that stretch rotary frequencies, and the embedding's number type.
    Raises ModelError if the architecture is not served or a field is missing, malformed or contradictory.
    """
    tensors, factors = tensors or {}, factors or {}
    general = Fields(metadata, where)
    architecture = general.word("general.architecture", tuple(_FAMILIES))
    family = _FAMILIES[architecture]
    fields = Fields(metadata, where, architecture + ".")
    fields.neutral(_NEUTRAL)
    vocab_size = _vocab_size(fields, tensors)
    hidden_size, num_heads, num_kv_heads, head_dim = head_counts(
        fields, "embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length"
    )
    if fields.count("attention.value_length", MOST_HEADS, head_dim) != head_dim:
        raise fields.refusal("attention.value_length", f"the head width {head_dim} (nothing else is served)")
    layers = _layers(fields, family, head_dim, factors)
    scale = _scale(fields, "attention.scale")
    if scale is None and architecture == "gemma3" and len(layers) == _LAYERS_OF_GEMMA3_27B:
        scale = (hidden_size / num_heads) ** -0.5
    # llama.cpp ends a generation at each of these: end of sequence, of turn and of message.
    ends = [general.token_ids(f"tokenizer.ggml.{end}_token_id", vocab_size) for end in ("eos", "eot", "eom")]
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.count("feed_forward_length", MOST_WIDTH),
        hidden_act=family.hidden_act,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-20, 0.1),
        max_position_embeddings=fields.count("context_length", MOST_POSITIONS),
        tie_embeddings=OUTPUT not in tensors,
        dtype=dtype,
        bos_token_id=next(iter(general.token_ids("tokenizer.ggml.bos_token_id", vocab_size)), None),
        eos_token_ids=tuple(dict.fromkeys(id for ids in ends for id in ids)),
        block=family.block,
        qkv_bias=QUERY_BIAS in tensors or QKV_BIAS in tensors,
        output_bias=OUTPUT_BIAS in tensors,
        query_key_norm=family.query_key_norm,
        experts=_experts(fields),
        attention_scale=scale,
        embedding_multiplier=_scale(fields, "embedding_scale")
        or (math.sqrt(hidden_size) if family.scaled_embedding else 1.0),
        residual_multiplier=_scale(fields, "residual_scale") or 1.0,
        logits_multiplier=1.0 / (_scale(fields, "logit_scale") or 1.0),
    )


def _vocab_size(fields: Fields, tensors: Mapping[str, tuple[int, ...]]) -> int:
    """The rows of the embedding, of which the last ones may have no token."""
    tokens = fields.values.get("tokenizer.ggml.tokens")
    num_tokens = len(tokens) if isinstance(tokens, list) else 0
    rows = tensors[EMBEDDING][0] if EMBEDDING in tensors else num_tokens
    vocab_size = fields.count("vocab_size", MOST_VOCABULARY, rows)
    if num_tokens > vocab_size:
        if fields.get("vocab_size") is None:
            raise ModelError(
                f"{fields.where}: tokenizer.ggml.tokens has {num_tokens} tokens, but tensor {EMBEDDING} only"
                f" {rows} rows; convert the model again"
            )
        raise fields.refusal("vocab_size", f"at least the {num_tokens} of tokenizer.ggml.tokens")
    return vocab_size


def _scale(fields: Fields, name: str) -> float | None:
    """A multiplier; as in llama.cpp zero means that there is none."""
    if fields.get(name) in (None, 0):
        return None
    return fields.number(name, 1 / _MOST_SCALE, _MOST_SCALE)


def _experts(fields: Fields) -> ExpertsConfig | None:
    if fields.get("expert_count") in (None, 0):
        return None
    count = fields.count("expert_count", _MOST_EXPERTS)
    width = fields.count("feed_forward_length", MOST_WIDTH)
    return ExpertsConfig(
        count=count,
        per_token=fields.count("expert_used_count", count),
        intermediate_size=fields.count("expert_feed_forward_length", MOST_WIDTH, width),
        normalised=fields.flag("expert_weights_norm", True),  # llama.cpp does, and few files say so
    )


def _layers(
    fields: Fields, family: _Family, head_dim: int, factors: Mapping[str, tuple[float, ...]]
) -> tuple[LayerConfig, ...]:
    count = fields.count("block_count", MOST_LAYERS)
    theta = fields.number("rope.freq_base", 1, MOST_FREQUENCY_BASE, 10000.0)
    dim = fields.count("rope.dimension_count", MOST_HEADS, head_dim)
    if dim > head_dim or dim % 2 or (dim < head_dim and not family.partial_rotary):
        raise fields.refusal("rope.dimension_count", f"the head width {head_dim} (nothing else is served)")
    rope = windowed_rope = Rope(theta, dim, read_scaling(fields, dim, factors))
    if family.unwindowed is not None:  # long contexts are for the other layers
        base = theta if family.window_theta is None else family.window_theta
        windowed_rope = Rope(fields.number("rope.freq_base_swa", 1, MOST_FREQUENCY_BASE, base), dim)
    window = None
    if fields.get("attention.sliding_window") not in (None, 0):
        window = fields.count("attention.sliding_window", MOST_POSITIONS)
    layers = []
    for index, has_window in enumerate(_windowed(fields, family, count)):
        windowed = window is not None and has_window
        rotated = family.unrotated is None or (index + 1) % family.unrotated
        layers.append(
            LayerConfig(
                rope=(windowed_rope if windowed else rope) if rotated else None,
                window=window if windowed else None,
                experts=fields.get("expert_count") not in (None, 0),
            )
        )
    return tuple(layers)


def _windowed(fields: Fields, family: _Family, count: int) -> list[bool]:
    """Which layers have the window, if there is one."""
    name = "attention.sliding_window_pattern"
    pattern = fields.get(name)
    if isinstance(pattern, list):
        if len(pattern) != count or not all(isinstance(windowed, bool) for windowed in pattern):
            raise fields.refusal(name, f"true or false for each of {count} layers, or how many layers repeat")
        return pattern
    period = family.unwindowed if pattern is None else fields.count(name, MOST_LAYERS)
    return [period is None or (index + 1) % period != 0 for index in range(count)]

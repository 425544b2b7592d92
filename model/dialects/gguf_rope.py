"""How GGUF's metadata, and some of its tensors, stretch rotary frequencies.

Keys are the `gguf` package's (`Keys.Rope`); what they do is in llama.cpp's `llama-context.cpp`.
"""

import math
from collections.abc import Mapping

from model.dialects.fields import MOST_POSITIONS, Fields
from model.errors import ModelError
from model.rope import (
    Divisors,
    Linear,
    LongRope,
    Scaling,
    Yarn,
    longrope_attention_factor,
    yarn_attention_factor,
)

FACTORS, LONG_FACTORS, SHORT_FACTORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
"""Tensors that hold a divisor for each frequency: Llama 3's, and LongRoPE's two sets."""

_MOST_FACTOR = 1e6
_KINDS = ("none", "linear", "yarn", "longrope")
_NEUTRAL: Mapping[str, object] = {
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
    "rope.scaling.alpha": 0,
}


def read_scaling(fields: Fields, dim: int, factors: Mapping[str, tuple[float, ...]]) -> Scaling | None:
    """Scaling of a rotation of `dim` numbers; `factors` are the numbers of the tensors above.

    Raises ModelError for what is malformed or contradictory.
    """
    fields.neutral(_NEUTRAL)
    for name, numbers in factors.items():
        if len(numbers) != dim // 2 or not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ModelError(f"{fields.where}: tensor {name} must hold {dim // 2} positive numbers")
    implied = "none"
    if LONG_FACTORS in factors or SHORT_FACTORS in factors:
        implied = "longrope"
    elif any(fields.get(name) is not None for name in ("rope.scaling.factor", "rope.scale_linear")):
        implied = "linear"  # the second key is the oldest files'
    kind = fields.word("rope.scaling.type", _KINDS, implied)
    if FACTORS in factors:
        if kind != "none":
            raise fields.refusal("rope.scaling.type", f"none or absent beside tensor {FACTORS}")
        return Divisors(factors[FACTORS])
    match kind:
        case "linear":
            old = fields.number("rope.scale_linear", 1e-3, _MOST_FACTOR, 1.0)
            return Linear(fields.number("rope.scaling.factor", 1e-3, _MOST_FACTOR, old))
        case "yarn":
            return _yarn(fields)
        case "longrope":
            return _longrope(fields, factors)
        case _:
            return None


def _yarn(fields: Fields) -> Yarn:
    factor = fields.number("rope.scaling.factor", 1e-3, _MOST_FACTOR)
    slow = fields.number("rope.scaling.yarn_beta_slow", 1e-3, _MOST_FACTOR, 1.0)
    more = fields.number("rope.scaling.yarn_attn_factor", 1e-3, _MOST_FACTOR, 1.0)
    return Yarn(
        factor=factor,
        original_max_position_embeddings=_original(fields),
        attention_factor=yarn_attention_factor(factor) * _attention_factor(fields, 1.0) * more,
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", slow, _MOST_FACTOR, max(slow, 32.0)),
        beta_slow=slow,
    )


def _longrope(fields: Fields, factors: Mapping[str, tuple[float, ...]]) -> LongRope:
    for name in (LONG_FACTORS, SHORT_FACTORS):
        if name not in factors:
            raise ModelError(f"{fields.where}: tensor {name} is missing; convert the model again")
    original = _original(fields)
    stretched = fields.count("context_length", MOST_POSITIONS) / original
    return LongRope(
        short_factors=factors[SHORT_FACTORS],
        long_factors=factors[LONG_FACTORS],
        original_max_position_embeddings=original,
        attention_factor=_attention_factor(fields, longrope_attention_factor(stretched, original)),
    )


def _original(fields: Fields) -> int:
    context = fields.count("context_length", MOST_POSITIONS)
    return fields.count("rope.scaling.original_context_length", MOST_POSITIONS, context)


def _attention_factor(fields: Fields, default: float) -> float:
    return fields.number("rope.scaling.attn_factor", 1e-3, _MOST_FACTOR, default)

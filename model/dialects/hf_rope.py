"""Rotary embedding in transformers' config.json: `rope_theta`, `rope_scaling`; since 5 `rope_parameters`.

Kinds and defaults are those of its `modeling_rope_utils`; a kind that is not served is refused by name.
"""

from collections.abc import Callable, Mapping

from model.dialects.fields import MOST_FREQUENCY_BASE, MOST_POSITIONS, Fields
from model.rope import (
    Linear,
    Llama3,
    LongRope,
    Rope,
    Scaling,
    Yarn,
    longrope_attention_factor,
    yarn_attention_factor,
)

_ORIGINAL = "original_max_position_embeddings"
_MOST_FACTOR = 1e6


def read_rope(
    fields: Fields, head_dim: int, *, partial: bool = False, aliases: Mapping[str, str] | None = None
) -> Rope:
    """Read the one way in which a model rotates.

    `partial`: whether `partial_rotary_factor` may be below one. `aliases`: a family's old names of kinds.
    """
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    values = _object(fields, name)
    if any(isinstance(value, Mapping) for value in values.values()):
        raise fields.refusal(name, "one kind of rotation for all layers (nothing else is served)")
    return _rope(fields, name, values, head_dim, partial, aliases or {})


def read_ropes_by_window(fields: Fields, head_dim: int) -> tuple[Rope, Rope]:
    """Read how layers without a window rotate, and how those with one do (Gemma 3)."""
    local = "rope_local_base_freq"
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    values = _object(fields, name)
    if name == "rope_scaling":  # which is of the long contexts, so of the others
        values = {"full_attention": values}
    if not set(values) <= {"full_attention", "sliding_attention"}:
        raise fields.refusal(name, "an object of full_attention and sliding_attention")
    by_type = Fields(values, f"{fields.where} ({name})")
    full, sliding = (_object(by_type, kind) for kind in ("full_attention", "sliding_attention"))
    base = 10000.0 if fields.get(local) is None else fields.get(local)
    return (
        _rope(fields, name, full, head_dim, False, {}),
        _rope(fields, name, {"rope_theta": base, **sliding}, head_dim, False, {}),
    )


def _object(fields: Fields, name: str) -> Mapping[str, object]:
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise fields.refusal(name, "an object or null")
    return value


def _rope(
    fields: Fields,
    name: str,
    values: Mapping[str, object],
    head_dim: int,
    partial: bool,
    aliases: Mapping[str, str],
) -> Rope:
    """Read one object `values`; what it does not say about base and rotated part the config itself does."""
    outer = ("rope_theta", "partial_rotary_factor", "max_position_embeddings")
    inherited = {field: fields.get(field) for field in outer if values.get(field) is None}
    # Where the config itself says it, as Phi-3's does, that counts, as in transformers.
    if fields.get(_ORIGINAL) is not None:
        inherited[_ORIGINAL] = fields.get(_ORIGINAL)
    rope = Fields({**values, **inherited}, f"{fields.where} ({name})")
    theta = rope.number("rope_theta", 1, MOST_FREQUENCY_BASE, 10000.0)
    dim = head_dim
    if partial:
        dim = int(head_dim * rope.number("partial_rotary_factor", 0, 1, 1.0))
        if dim < 2 or dim % 2:
            raise rope.refusal("partial_rotary_factor", f"so much that pairs of {head_dim} are rotated")
    else:
        rope.neutral({"partial_rotary_factor": 1})
    kind = rope.word(
        "type" if rope.get("rope_type") is None else "rope_type", (*_SCALINGS, *aliases), "default"
    )
    return Rope(theta, dim, _SCALINGS[aliases.get(kind, kind)](rope, dim))


def _no_scaling(rope: Fields, dim: int) -> None:
    return None


def _linear(rope: Fields, dim: int) -> Linear:
    return Linear(rope.number("factor", 1e-3, _MOST_FACTOR))


def _llama3(rope: Fields, dim: int) -> Llama3:
    low = rope.number("low_freq_factor", 1e-3, _MOST_FACTOR)
    high = rope.number("high_freq_factor", 1e-3, _MOST_FACTOR)
    if low >= high:
        raise rope.refusal("high_freq_factor", f"above low_freq_factor, which is {low:g}")
    return Llama3(
        factor=rope.number("factor", 1, _MOST_FACTOR),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=rope.count(_ORIGINAL, MOST_POSITIONS),
    )


def _yarn(rope: Fields, dim: int) -> Yarn:
    if rope.get("rope_theta") == 1:
        raise rope.refusal("rope_theta", "above 1 for YaRN")
    original = rope.count(_ORIGINAL, MOST_POSITIONS)
    longest = rope.count("max_position_embeddings", MOST_POSITIONS)
    factor = rope.number("factor", 1e-3, _MOST_FACTOR, longest / original)
    scales = (rope.number(name, 0, _MOST_FACTOR, 0.0) for name in ("mscale", "mscale_all_dim"))
    slow = rope.number("beta_slow", 1e-3, _MOST_FACTOR, 1.0)
    fast = rope.number("beta_fast", 1e-3, _MOST_FACTOR, 32.0)
    if fast < slow:
        raise rope.refusal("beta_fast", f"at least beta_slow, which is {slow:g}")
    return Yarn(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=rope.number(
            "attention_factor", 1e-3, _MOST_FACTOR, yarn_attention_factor(factor, *scales)
        ),
        beta_fast=fast,
        beta_slow=slow,
        truncate=rope.flag("truncate", True),
    )


def _longrope(rope: Fields, dim: int) -> LongRope:
    original = rope.count(_ORIGINAL, MOST_POSITIONS, least=2)
    longest = rope.count("max_position_embeddings", MOST_POSITIONS)
    factor = rope.number("factor", 1e-3, _MOST_FACTOR, longest / original)
    return LongRope(
        short_factors=_factors(rope, "short_factor", dim // 2),
        long_factors=_factors(rope, "long_factor", dim // 2),
        original_max_position_embeddings=original,
        attention_factor=rope.number(
            "attention_factor", 1e-3, _MOST_FACTOR, longrope_attention_factor(factor, original)
        ),
    )


def _factors(rope: Fields, name: str, count: int) -> tuple[float, ...]:
    values = rope.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise rope.refusal(name, f"a list of {count} numbers, one for each pair that is rotated")
    for value in values:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= _MOST_FACTOR:
            raise rope.refusal(name, "made of positive numbers")
    return tuple(float(value) for value in values)


_SCALINGS: Mapping[str, Callable[[Fields, int], Scaling | None]] = {
    "default": _no_scaling,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""By transformers' name; `dim` is how many of a head's numbers are rotated."""

"""What differs from layer to layer in transformers' config.json: rotation, window, experts."""

from collections.abc import Callable

from model.config import LayerConfig
from model.dialects.fields import MOST_LAYERS, MOST_POSITIONS, Fields, head_counts
from model.dialects.hf_rope import read_rope, read_ropes_by_window
from model.rope import Rope

Layers = tuple[LayerConfig, ...]
Choice = Callable[[int], bool]
"""Whether something holds for the layer of this index."""

_TYPES = ("full_attention", "sliding_attention")


def every(index: int) -> bool:
    """All layers."""
    return True


def none(index: int) -> bool:
    """No layer."""
    return False


def counts(fields: Fields) -> tuple[int, int, int, int]:
    """Read hidden size, heads, key-value heads and head width."""
    return head_counts(fields, "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def read_layers(
    fields: Fields,
    *,
    sliding: Choice = none,
    experts: Choice = none,
    rotated: Choice = every,
    rope: Rope | None = None,
) -> Layers:
    """Read the layers of a model that rotates in one way: `rope`, or the one that its config says.

    `sliding` says which have the window if `layer_types` does not.
    """
    rope = rope or read_rope(fields, counts(fields)[3])
    return tuple(
        LayerConfig(rope if rotated(index) else None, window, experts(index))
        for index, window in enumerate(_windows(fields, sliding))
    )


def read_layers_of_two_ropes(fields: Fields, *, sliding: Choice) -> Layers:
    """Read the layers of a model that rotates in another way where there is a window (Gemma 3)."""
    full, local = read_ropes_by_window(fields, counts(fields)[3])
    return tuple(
        LayerConfig(full if window is None else local, window) for window in _windows(fields, sliding)
    )


def above(fields: Fields, name: str) -> Choice:
    """Layers from the index on that a field gives."""
    first = fields.count(name, MOST_LAYERS, least=0)
    return lambda index: index >= first


def not_every(fields: Fields, name: str, default: int) -> Choice:
    """All layers but every so-many-th, as a field says."""
    period = fields.count(name, MOST_LAYERS, default)
    return lambda index: (index + 1) % period != 0


def flagged(fields: Fields, name: str, default: Choice) -> Choice:
    """Layers for which a list of zeros and ones has a one, where there is that list."""
    flags, count = fields.get(name), _count(fields)
    if flags is None:
        return default
    if not isinstance(flags, list) or len(flags) != count or not all(flag in (0, 1) for flag in flags):
        raise fields.refusal(name, f"a list of {count} zeros and ones, one for each layer")
    return lambda index: bool(flags[index])


def sparse(fields: Fields) -> Choice:
    """Layers that are mixtures of experts: every `decoder_sparse_step`-th, but for `mlp_only_layers`."""
    step, count = fields.count("decoder_sparse_step", MOST_LAYERS, 1), _count(fields)
    dense = [] if fields.get("mlp_only_layers") is None else fields.get("mlp_only_layers")
    if not isinstance(dense, list) or not all(
        isinstance(index, int) and not isinstance(index, bool) and 0 <= index < count for index in dense
    ):
        raise fields.refusal("mlp_only_layers", f"a list of layers from 0 to {count - 1}")
    return lambda index: index not in dense and (index + 1) % step == 0


def _count(fields: Fields) -> int:
    return fields.count("num_hidden_layers", MOST_LAYERS)


def _windows(fields: Fields, sliding: Choice) -> list[int | None]:
    """Each layer's window, as `layer_types` says or else `sliding`."""
    count, types, window = _count(fields), fields.get("layer_types"), None
    if fields.flag("use_sliding_window", True) and fields.get("sliding_window") is not None:
        window = fields.count("sliding_window", MOST_POSITIONS)
    if types is None:
        return [window if sliding(index) else None for index in range(count)]
    if not isinstance(types, list) or len(types) != count or not all(kind in _TYPES for kind in types):
        raise fields.refusal("layer_types", f"a list of {count}, each {' or '.join(_TYPES)}")
    if window is None and _TYPES[1] in types:
        raise fields.refusal("layer_types", f"free of {_TYPES[1]}, as there is no sliding_window in use")
    return [window if kind == _TYPES[1] else None for kind in types]

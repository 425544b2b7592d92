"""A foreign mapping with typed and bounded access: what is malformed is refused by file and field."""

from collections.abc import Mapping
from dataclasses import dataclass

from model.errors import ModelError

# Far above any published model, far below what would hurt: a number beyond is a corrupt or a hostile file.
MOST_VOCABULARY = 1 << 24
MOST_WIDTH = 1 << 20
MOST_LAYERS = 1 << 12
MOST_HEADS = 1 << 12  # and the most that one is wide
MOST_EXPERTS = 1 << 12
MOST_POSITIONS = 1 << 28
MOST_FREQUENCY_BASE = 1e15


@dataclass(frozen=True, slots=True)
class Fields:
    """A foreign mapping with typed and bounded access; null counts as absent, a refusal names the field."""

    values: Mapping[str, object]
    where: str
    prefix: str = ""

    def get(self, name: str) -> object:
        """A field's raw value; None if absent."""
        return self.values.get(self.prefix + name)

    def refusal(self, name: str, wanted: str) -> ModelError:
        """What to raise for a field that is not what is wanted."""
        value = self.get(name)
        if value is None:
            return ModelError(f"{self.where}: field {self.prefix}{name} is missing, it must be {wanted}")
        return ModelError(f"{self.where}: field {self.prefix}{name} is {shown(value)}, it must be {wanted}")

    def count(self, name: str, most: int, default: int | None = None, *, least: int = 1) -> int:
        """Return a whole number from `least` to `most`."""
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.refusal(name, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, least: float, most: float, default: float | None = None) -> float:
        """Return a finite number from `least` to `most`."""
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
            raise self.refusal(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, bool):
            raise self.refusal(name, "true or false")
        return value

    def word(self, name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """Return one of the allowed words."""
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, str) or value not in allowed:
            raise self.refusal(name, f"{' or '.join(allowed)} (nothing else is served)")
        return value

    def neutral(self, table: Mapping[str, object]) -> None:
        """Refuse fields that would change the arithmetic."""
        for name, value in table.items():
            if self.get(name) is not None and self.get(name) != value:
                raise self.refusal(name, f"{shown(value)} or absent (nothing else is served)")

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Return the ids of a field that holds an id, a list of ids or nothing; repeated ids count once."""
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for id in ids:
            if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < vocab_size:
                raise self.refusal(name, f"made of token ids from 0 to {vocab_size - 1}")
        return tuple(dict.fromkeys(ids))


def head_counts(
    fields: Fields, hidden: str, heads: str, kv_heads: str, width: str
) -> tuple[int, int, int, int]:
    """Return hidden size, heads, key-value heads and head width from fields of these names, if they fit."""
    hidden_size = fields.count(hidden, MOST_WIDTH)
    num_heads = fields.count(heads, MOST_HEADS)
    num_kv_heads = fields.count(kv_heads, MOST_HEADS, num_heads)
    if num_heads % num_kv_heads:
        raise fields.refusal(heads, f"a multiple of {fields.prefix}{kv_heads}, which is {num_kv_heads}")
    if fields.get(width) is None and hidden_size % num_heads:
        raise fields.refusal(
            hidden, f"a multiple of {num_heads} heads, or {fields.prefix}{width} must be given"
        )
    head_dim = fields.count(width, MOST_HEADS, hidden_size // num_heads)
    if head_dim % 2:
        raise ModelError(f"{fields.where}: head_dim is {head_dim}, but rotary embedding needs pairs")
    return hidden_size, num_heads, num_kv_heads, head_dim


def shown(value: object) -> str:
    """Return a foreign value for a message: on one line and short."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    shown = ascii(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."

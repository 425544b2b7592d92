"""What a checkpoint will take and give on this machine, from its headers alone: nothing is loaded."""

import math
import re
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.loader import example_parameters, parameter_shapes
from model.ops.base import Ops
from model.weights.checkpoint import Checkpoint

SHARE_OF_BANDWIDTH = 0.6
"""Of the speed at which memory is read, what a decode step of one sequence reaches (docs/performance.md)."""


@dataclass(frozen=True, slots=True)
class Part:
    """The same parameter of all layers, or of all experts."""

    name: str
    """Ours, a star for each number."""
    kinds: tuple[str, ...]
    """Number types and block formats that its tensors have in the file."""
    tensors: int
    numbers: int
    """In all its tensors together."""
    memory: int
    """Bytes in the op set's form."""
    active: float
    """Share of the numbers that one token is multiplied with."""

    def joined(self, other: "Part") -> "Part":
        """Itself and more of the same."""
        return replace(
            self,
            kinds=tuple(dict.fromkeys(self.kinds + other.kinds)),
            tensors=self.tensors + other.tensors,
            numbers=self.numbers + other.numbers,
            memory=self.memory + other.memory,
        )


@dataclass(frozen=True, slots=True)
class Footprint:
    """Sizes of a model on one op set."""

    parts: tuple[Part, ...]

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return sum(part.numbers for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """Numbers that one token is multiplied with."""
        return round(sum(part.numbers * part.active for part in self.parts))

    @property
    def memory(self) -> int:
        """Bytes of the weights when they are loaded."""
        return sum(part.memory for part in self.parts)

    @property
    def read(self) -> float:
        """Bytes of the weights that a step of one token reads."""
        return sum(part.memory * part.active for part in self.parts)


def measure(checkpoint: Checkpoint, ops: Ops) -> Footprint:
    """Sizes from the headers; ModelError where config and tensors do not belong together."""
    config = checkpoint.config
    shapes = parameter_shapes(config)
    checkpoint.check(shapes)
    parts: dict[str, Part] = {}
    for name, weight in example_parameters(config, ops).items():
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        stored = checkpoint.whole(name)
        size = ops.weight_bytes(weight, stored)
        one = Part(pattern, (stored.kind,), 1, math.prod(shapes[name]), size, _active(config, pattern))
        parts[pattern] = parts[pattern].joined(one) if pattern in parts else one
    return Footprint(tuple(parts.values()))


def cache_bytes(config: ModelConfig, ops: Ops, tokens: int) -> int:
    """Keys and values of a sequence of so many tokens; layers with a window keep no more than that."""
    layout = ops.cache_layout(config.num_kv_heads, config.head_dim)
    kept = sum(tokens if layer.window is None else min(tokens, layer.window) for layer in config.layers)
    return 2 * kept * config.num_kv_heads * config.head_dim * layout.dtype.itemsize


def _active(config: ModelConfig, pattern: str) -> float:
    """Share of a part that one token is multiplied with."""
    if pattern == "embedding" and not config.tie_embeddings:
        return 1 / config.vocab_size  # a row is read, and not the table
    if ".experts." in pattern and config.experts is not None:
        return config.experts.per_token / config.experts.count
    return 1.0

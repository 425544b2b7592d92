"""Rotary position embeddings (arXiv:2104.09864): their forms, in numbers alone; rotary.py makes the table."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Linear:
    """All frequencies divided by a factor (arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3:
    """Llama 3.1's stretching of the low frequencies.

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
class Divisors:
    """Each frequency with a divisor of its own: a GGUF's `rope_freqs.weight`."""

    divisors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN (arXiv:2309.00071): slow rotations divided by a factor, fast ones kept, a ramp between them."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    """Multiplies cosines and sines, so scores by its square; see `yarn_attention_factor`."""
    beta_fast: float = 32.0
    """Turns within the original context above which a rotation is kept."""
    beta_slow: float = 1.0
    """Turns below which it is divided."""
    truncate: bool = True
    """Whether the ramp begins and ends at whole frequencies."""

    def __post_init__(self) -> None:
        assert self.factor > 0
        assert self.beta_fast >= self.beta_slow > 0


@dataclass(frozen=True, slots=True)
class LongRope:
    """LongRoPE (arXiv:2402.13753): a divisor for each frequency, of a set for short contexts or one for long.

    Which set is decided once, by the longest context that is served: the long one if that is above the
    original. The reference decides by the length of each input; then keys of a cache, which are never rotated
    again, would be wrong from the token on that crosses the border.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float
    """Multiplies cosines and sines, in either case; see `longrope_attention_factor`."""


Scaling = Linear | Llama3 | Divisors | Yarn | LongRope


@dataclass(frozen=True, slots=True)
class Rope:
    """One way of rotating."""

    theta: float
    dim: int
    """How many of a head's numbers are rotated: the first ones, in pairs (i, i + dim / 2)."""
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        assert self.dim % 2 == 0
        match self.scaling:
            case Divisors(divisors):
                assert len(divisors) == self.dim // 2
            case LongRope(short_factors, long_factors):
                assert len(short_factors) == len(long_factors) == self.dim // 2


def yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """YaRN's own attention factor; the two scales count if neither is zero (arXiv:2405.04434)."""
    if factor <= 1:
        return 1.0
    if mscale and mscale_all_dim:
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all_dim * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def longrope_attention_factor(factor: float, original_max_position_embeddings: int) -> float:
    """LongRoPE's own; `factor` is how much longer the context became."""
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_max_position_embeddings))

"""The table of cosines and sines that rotary position embeddings (rope.py) turn queries and keys by."""

import math

import torch
from torch import Tensor

from model.rope import Divisors, Linear, Llama3, LongRope, Rope, Scaling, Yarn


def rotary_table(rope: Rope, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """[positions, 2, head_dim / 2] in float32: cosines, then sines; one and zero for numbers that stay.

    `num_positions` is the longest context that is served. Rows of queries and keys stand so that the ops can
    rotate pairs (i, i + head_dim / 2) (weights/row_order.py).
    """
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * _frequencies(rope, num_positions)
    table = torch.stack((angles.cos(), angles.sin()), dim=1) * _attention_factor(rope.scaling)
    stay = torch.tensor([1.0, 0.0])[:, None].expand(num_positions, 2, (head_dim - rope.dim) // 2)
    return torch.cat((table, stay), dim=2).to(device)


def _frequencies(rope: Rope, num_positions: int) -> Tensor:
    """Angle of each pair's rotation from one position to the next: [dim / 2]."""
    periods = rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    match rope.scaling:
        case None:
            return 1.0 / periods
        case Linear(factor):
            return 1.0 / periods / factor
        case Divisors(divisors):
            return 1.0 / periods / torch.tensor(divisors)
        case Llama3() as scaling:
            return _scale_llama3(1.0 / periods, scaling)
        case Yarn() as scaling:
            return _ramp_yarn(periods, rope, scaling)
        case LongRope(short_factors, long_factors, original):
            factors = long_factors if num_positions > original else short_factors
            return 1.0 / (torch.tensor(factors) * periods)


def _attention_factor(scaling: Scaling | None) -> float:
    return scaling.attention_factor if isinstance(scaling, (Yarn, LongRope)) else 1.0


def _scale_llama3(frequencies: Tensor, scaling: Llama3) -> Tensor:
    """Slow rotations are slowed by `factor`, fast ones kept, in between the two are blended.

    Source: `_compute_llama3_parameters` in transformers.
    """
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / scaling.factor)


def _ramp_yarn(periods: Tensor, rope: Rope, scaling: Yarn) -> Tensor:
    """Between the frequencies that turn beta_fast and beta_slow times within the original context, a ramp.

    Source: `_compute_yarn_parameters` in transformers.
    """
    original = scaling.original_max_position_embeddings
    low, high = (
        rope.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low or 0.001  # no division by zero
    divided = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - divided
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept

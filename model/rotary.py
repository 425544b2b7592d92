"""Rotary position embeddings (arXiv:2104.09864): the table of cosines and sines by position."""

import math

import torch
from torch import Tensor

from model.config import Llama3RopeScaling, ModelConfig


def rotary_table(config: ModelConfig, num_positions: int, device: torch.device) -> Tensor:
    """[positions, 2, head_dim / 2] in float32: cosines, then sines."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents  # [head_dim / 2]
    if config.rope_scaling is not None:
        frequencies = _scale_llama3(frequencies, config.rope_scaling)
    if config.rope_factors is not None:
        frequencies = frequencies / torch.tensor(config.rope_factors)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(device)


def _scale_llama3(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Llama 3.1's long-context scaling: slow rotations are slowed by `factor`, fast ones kept.

    In between the two are blended; source: `_compute_llama3_parameters` in transformers.
    """
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / scaling.factor)

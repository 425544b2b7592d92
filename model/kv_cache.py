"""The tensors of the KV-cache pool and their layout; who owns which block is the scheduler's matter.

A slot is the place of one token: slot = block id * block size + offset. Keys are stored rotated, at
their absolute position, so that nothing written is ever touched again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """What one token takes in the pool, all layers together."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """How an op set keeps a block of one layer."""

    block_size: int
    """Tokens a block."""
    keys: tuple[int, ...]
    """Shape of a block's keys; the values' may differ."""
    values: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values; a block's layout is the op set's."""

    keys: Tensor  # [blocks, ...], under the torch ops [blocks, block_size, kv_heads, head_dim]
    values: Tensor
    kv_heads: int
    head_dim: int

    @property
    def key_slots(self) -> Tensor:
        """The keys by slot, a view; of the torch ops' layout."""
        return self.keys.flatten(0, 1)  # [slots, kv_heads, head_dim]

    @property
    def value_slots(self) -> Tensor:
        """The values by slot, a view; of the torch ops' layout."""
        return self.values.flatten(0, 1)  # [slots, kv_heads, head_dim]


class KVCache:
    """`num_blocks` blocks for each layer in the layout of an op set, allocated once."""

    def __init__(self, config: ModelConfig, num_blocks: int, layout: CacheLayout) -> None:
        self.num_blocks = num_blocks
        self.block_size = layout.block_size

        def pool(shape: tuple[int, ...]) -> Tensor:
            return torch.empty((num_blocks, *shape), dtype=layout.dtype, device=layout.device)

        self.layers = tuple(
            LayerCache(pool(layout.keys), pool(layout.values), config.num_kv_heads, config.head_dim)
            for _ in range(config.num_layers)
        )

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to); none is both."""
        sources, targets = (
            torch.tensor(blocks, device=self.layers[0].keys.device) for blocks in zip(*pairs, strict=True)
        )
        for layer in self.layers:
            layer.keys[targets] = layer.keys[sources]
            layer.values[targets] = layer.values[sources]

    def fill(self, blocks: Sequence[int], value: float) -> None:
        """Overwrite whole blocks: tests poison free blocks to show that nobody reads them."""
        index = torch.tensor(list(blocks), dtype=torch.long, device=self.layers[0].keys.device)
        for layer in self.layers:
            layer.keys[index] = value
            layer.values[index] = value

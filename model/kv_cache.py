"""The tensors of the KV-cache pool and their layout; who owns which block is the scheduler's matter.

A slot is the place of one token: slot = block id * block size + offset. Keys are stored rotated, at
their absolute position, so that nothing written is ever touched again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import memory
from model.batch import Copy
from model.config import CacheGroup, ModelConfig


def bytes_per_token(config: ModelConfig, dtype: torch.dtype, group: CacheGroup | None = None) -> int:
    """What one token takes in the pool, all layers together, or those of a group."""
    num_layers = config.num_layers if group is None else len(group.layers)
    return 2 * num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


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
    group: int = 0
    """Whose block tables and slots are its own, by index in ModelConfig.cache_groups."""

    @property
    def key_slots(self) -> Tensor:
        """The keys by slot, a view; of the torch ops' layout."""
        return self.keys.flatten(0, 1)  # [slots, kv_heads, head_dim]

    @property
    def value_slots(self) -> Tensor:
        """The values by slot, a view; of the torch ops' layout."""
        return self.values.flatten(0, 1)  # [slots, kv_heads, head_dim]

    def blocks(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the blocks from `first` to `end`, views."""
        return self.keys[first:end], self.values[first:end]


class KVCache:
    """For each layer the blocks of its group, in the layout of an op set, allocated once."""

    def __init__(self, config: ModelConfig, num_blocks: Sequence[int], layout: CacheLayout) -> None:
        self.groups = config.cache_groups
        self.num_blocks = tuple(num_blocks)
        """By group."""
        self.block_size = layout.block_size
        group_of = {layer: index for index, group in enumerate(self.groups) for layer in group.layers}
        assert len(self.num_blocks) == len(self.groups)

        def pool(blocks: int, shape: tuple[int, ...]) -> Tensor:
            return memory.zeros((blocks, *shape), layout.dtype, layout.device)

        def layer_cache(group: int) -> LayerCache:
            keys, values = (pool(self.num_blocks[group], shape) for shape in (layout.keys, layout.values))
            return LayerCache(keys, values, config.num_kv_heads, config.head_dim, group)

        self.layers = tuple(layer_cache(group_of[layer]) for layer in range(config.num_layers))

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy whole blocks; none is both source and target."""
        for group in {copy.group for copy in copies}:
            sources = self._index([copy.source for copy in copies if copy.group == group])
            targets = self._index([copy.target for copy in copies if copy.group == group])
            for layer in self._layers_of(group):
                layer.keys[targets] = layer.keys[sources]
                layer.values[targets] = layer.values[sources]

    def fill(self, blocks: Sequence[int], value: float, group: int = 0) -> None:
        """Overwrite whole blocks: tests poison free blocks to show that nobody reads them."""
        index = self._index(blocks)
        for layer in self._layers_of(group):
            layer.keys[index] = value
            layer.values[index] = value

    def _layers_of(self, group: int) -> list[LayerCache]:
        return [layer for layer in self.layers if layer.group == group]

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(list(blocks), dtype=torch.long, device=self.layers[0].keys.device)

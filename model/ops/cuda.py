"""The op set on an NVIDIA GPU: the torch ops, with torch's paged flash attention kernel.

Untested on hardware: the tests run its layout on the CPU with a plain stand-in for the kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import HOLE, Batch
from model.kv_cache import LayerCache
from model.ops.layout import StepInputs
from model.ops.reference import TorchOps


@dataclass(frozen=True, slots=True)
class CudaInputs(StepInputs):
    """With what the paged kernel reads."""

    query_starts: Tensor  # [sequences + 1] int32: where each chunk's rows begin
    contexts: Tensor  # [sequences] int32: tokens visible to each chunk's last row
    block_tables: tuple[Tensor, ...]  # by cache group [sequences, most blocks] int32
    longest_chunk: int
    longest_context: int


@cache
def paged_attention() -> Callable[..., Tensor]:
    """Torch's kernel, imported when it is needed: its module takes a second, on a CPU for nothing."""
    import torch._meta_registrations  # noqa: F401 - left out at the start (model/lean.py)
    from torch.nn.attention.varlen import varlen_attn

    return cast(Callable[..., Tensor], varlen_attn)


class CudaOps(TorchOps):
    """float16 and bfloat16 only, as the kernel."""

    name = "cuda"
    block_size = 256  # FlashAttention 2 takes pages of a multiple of 256 tokens

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self.cache_dtype = dtype

    def prepare(
        self, batch: Batch, num_heads: int, num_kv_heads: int, windows: Sequence[int | None] = (None,)
    ) -> StepInputs:
        """Lay a batch out as tensors; the rows stand in the order of its chunks."""
        shared = self.layout.rows(batch)
        chunks = batch.chunks
        groups = zip(*(chunk.block_tables for chunk in chunks), strict=True)
        counts = self._int32([chunk.count for chunk in chunks])
        return CudaInputs(
            token_ids=shared.token_ids,
            positions=shared.positions,
            slots=shared.slots,
            adapted=shared.adapted,
            query_starts=F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)),
            contexts=self._int32([chunk.stop for chunk in chunks]),
            block_tables=tuple(self._tables(group) for group in groups),
            longest_chunk=max(chunk.count for chunk in chunks),
            longest_context=max(chunk.stop for chunk in chunks),
        )

    def _tables(self, tables: Sequence[Sequence[int]]) -> Tensor:
        """Block tables of one group, filled up to the longest."""
        longest = max(len(table) for table in tables)
        return self._int32([[*table, *[HOLE] * (longest - len(table))] for table in tables])

    def _int32(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def attention(self, query: Tensor, cache: LayerCache, inputs: StepInputs, window: int | None) -> Tensor:
        """Causal attention over the paged cache: [rows, heads, head_dim] -> [rows, heads * head_dim]."""
        assert isinstance(inputs, CudaInputs)
        out = paged_attention()(
            query,
            cache.keys,
            cache.values,
            inputs.query_starts,
            None,
            inputs.longest_chunk,
            inputs.longest_context,
            window_size=(-1 if window is None else window - 1, 0),  # causal, aligned to the lower right
            scale=1.0,
            enable_gqa=True,
            seqused_k=inputs.contexts,
            block_table=inputs.block_tables[cache.group],
            num_splits=1,  # a row's result must not depend on its neighbours
        )
        return out.flatten(1)

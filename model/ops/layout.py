"""A batch as tensors: rows, slots and adapters, and how the reference attention reads the cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch, Chunk


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Attention of one chunk of several rows."""

    rows: slice
    slots: Tensor  # [context]: the sequence's slots that some row sees, up to the chunk's end
    mask: Tensor | None  # [rows, context], True = visible; None where each row sees all up to its own


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Attention of all chunks of a single row, as a sparse product.

    With one matrix row for each query head and one column for each (slot, kv head), the scores are the
    product of queries and keys sampled where a block table says so: `pattern`. Its values are laid
    out row after row; `places` puts them into a rectangle for the softmax.
    """

    rows: Tensor  # [sequences]
    pattern: Tensor  # sparse CSR [sequences * heads, slots * kv_heads]
    columns: Tensor  # [n]: kv-head-wise slots
    starts: Tensor  # [sequences * heads]: where each row's values begin
    places: Tensor | None  # [n] in [sequences * heads, longest]; None where all are of one length
    longest: int


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Attention of all of a pass's chunks within one window."""

    decode: DecodePlan | None
    prefills: tuple[PrefillPlan, ...]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A batch as tensors: what every layer of one pass shares."""

    token_ids: Tensor  # [rows]
    positions: Tensor  # [rows]
    slots: tuple[Tensor, ...]  # by cache group [rows]: where each row's key and value go
    adapted: Mapping[int, Tensor]
    """The rows of each adapter that is asked for."""


@dataclass(frozen=True, slots=True)
class TorchInputs(StepInputs):
    """With the plan of the reference attention."""

    plans: dict[int | None, "AttentionPlan"]
    """By window."""


class BatchLayout:
    """Lays batches out on a device, over a cache of blocks of `block_size` tokens."""

    def __init__(self, device: torch.device, block_size: int) -> None:
        self.device = device
        self.block_size = block_size

    def inputs(
        self, batch: Batch, num_heads: int, num_kv_heads: int, windows: Sequence[int | None] = (None,)
    ) -> TorchInputs:
        """Lay a batch out as tensors; rows in the order of its chunks, windows in that of groups."""
        shared = self.rows(batch)
        return TorchInputs(
            token_ids=shared.token_ids,
            positions=shared.positions,
            slots=shared.slots,
            adapted=shared.adapted,
            plans={
                window: self._plan(batch, num_heads, num_kv_heads, group, window)
                for group, window in enumerate(windows)
            },
        )

    def _plan(
        self, batch: Batch, num_heads: int, num_kv_heads: int, group: int, window: int | None
    ) -> AttentionPlan:
        decodes, prefills, row = [], [], 0
        for chunk in batch.chunks:
            if chunk.count == 1:
                decodes.append((row, chunk))
            else:
                prefills.append(self._prefill_plan(row, chunk, group, window))
            row += chunk.count
        decode = self._decode_plan(decodes, num_heads, num_kv_heads, group, window) if decodes else None
        return AttentionPlan(decode, tuple(prefills))

    def rows(self, batch: Batch) -> StepInputs:
        """What needs no plan."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[list[int]] = [[] for _ in batch.chunks[0].block_tables]
        adapted: dict[int, list[int]] = {}
        size = self.block_size
        for chunk in batch.chunks:
            span = range(chunk.start, chunk.stop)
            if chunk.adapter:
                adapted.setdefault(chunk.adapter, []).extend(
                    range(len(positions), len(positions) + chunk.count)
                )
            token_ids.extend(chunk.token_ids[chunk.start : chunk.stop])
            positions.extend(span)
            for group, table in zip(slots, chunk.block_tables, strict=True):
                group.extend(table[p // size] * size + p % size for p in span)
        return StepInputs(
            self._index(token_ids),
            self._index(positions),
            tuple(self._index(group) for group in slots),
            {adapter: self._index(rows) for adapter, rows in adapted.items()},
        )

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _slots(self, chunk: Chunk, group: int, first: int) -> Tensor:
        """The slots of a sequence's positions from `first` to the end of its chunk."""
        blocks = self._index(chunk.block_tables[group])[:, None] * self.block_size
        return (blocks + torch.arange(self.block_size, device=self.device)).flatten()[first : chunk.stop]

    def _prefill_plan(self, row: int, chunk: Chunk, group: int, window: int | None) -> PrefillPlan:
        mask, first = None, _first_visible(chunk, window)
        if chunk.start > 0 or (window is not None and chunk.stop > window):
            # Lower right: row i of the chunk stands at position start + i and sees all up to there.
            shape = (chunk.count, chunk.stop)
            mask = torch.ones(shape, dtype=torch.bool, device=self.device).tril(chunk.start)
            if window is not None:
                mask = mask.triu(chunk.start - window + 1)
            mask = mask[:, first:]
        return PrefillPlan(slice(row, row + chunk.count), self._slots(chunk, group, first), mask)

    def _decode_plan(
        self,
        decodes: Sequence[tuple[int, Chunk]],
        num_heads: int,
        num_kv_heads: int,
        group: int,
        window: int | None,
    ) -> DecodePlan:
        firsts = [_first_visible(chunk, window) for _, chunk in decodes]
        visible = [chunk.stop - first for (_, chunk), first in zip(decodes, firsts, strict=True)]
        shared_by = num_heads // num_kv_heads
        kv_head = (torch.arange(num_heads, device=self.device) // shared_by)[:, None]  # [heads, 1]
        columns = torch.cat(
            [
                (self._slots(chunk, group, first) * num_kv_heads + kv_head).flatten()
                for (_, chunk), first in zip(decodes, firsts, strict=True)
            ]
        )  # [n], for each sequence [heads, context]
        assert len(columns) == num_heads * sum(visible)  # the product trusts us
        contexts = self._index(visible)
        lengths = contexts.repeat_interleave(num_heads)  # [sequences * heads]
        bounds = F.pad(lengths.cumsum(0), (1, 0))
        longest = max(visible)
        places = None
        if min(visible) < longest:
            matrix_row = torch.arange(len(lengths), device=self.device).repeat_interleave(lengths)
            places = (
                torch.arange(len(columns), device=self.device) - bounds[matrix_row] + matrix_row * longest
            )
        blocks = max(max(chunk.block_tables[group]) for _, chunk in decodes) + 1
        width = blocks * self.block_size * num_kv_heads
        pattern = torch.sparse_csr_tensor(
            bounds, columns, torch.zeros(len(columns), device=self.device), size=(len(lengths), width)
        )
        rows = self._index([row for row, _ in decodes])
        return DecodePlan(rows, pattern, columns, bounds[:-1], places, longest)


def _first_visible(chunk: Chunk, window: int | None) -> int:
    """The first position that the chunk's first row sees."""
    return 0 if window is None else max(0, chunk.start + 1 - window)

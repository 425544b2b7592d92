"""A Batch as the native kernels read it (native/pass.h): token ids, positions, block tables in arrays."""

from dataclasses import dataclass

import numpy as np

from model.batch import Batch
from model.ops import library

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Pass:
    """The C structure, with the arrays that it points at."""

    struct: library.Pass
    arrays: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, batch: Batch) -> "Pass":
        """Lay a batch out; the rows stand in the order of its chunks."""
        chunks = batch.chunks
        token_ids = np.concatenate([chunk.token_ids[chunk.start : chunk.stop] for chunk in chunks])
        positions = np.concatenate([np.arange(chunk.start, chunk.stop, dtype=np.int32) for chunk in chunks])
        sequences = np.repeat(np.arange(len(chunks), dtype=np.int32), [chunk.count for chunk in chunks])
        groups = tuple(zip(*(chunk.block_tables for chunk in chunks), strict=True))
        tables = np.zeros((len(groups), len(chunks), max(map(len, groups[0]))), dtype=np.int32)
        for group, rows in zip(tables, groups, strict=True):
            for row, table, chunk in zip(group, rows, chunks, strict=True):
                assert len(table) * BLOCK_SIZE >= chunk.stop  # the kernels trust us
                row[: len(table)] = table
        adapters = np.array([chunk.adapter for chunk in chunks], dtype=np.int32)
        arrays = (token_ids.astype(np.int32), positions, sequences, tables, adapters)
        *pointers, last = [array.ctypes.data for array in arrays]
        adapted = last if adapters.any() else None
        struct = library.Pass(len(positions), 0, tables.shape[2], len(chunks), *pointers, None, adapted)
        return cls(struct, arrays)

    @classmethod
    def empty(cls) -> "Pass":
        """A pass of no rows."""
        return cls(library.Pass(), ())

    def select(self, rows: np.ndarray) -> "Pass":
        """The same pass with these rows selected."""
        struct = library.Pass.from_buffer_copy(self.struct)
        struct.selected = len(rows)
        struct.selection = rows.ctypes.data
        return Pass(struct, (*self.arrays, rows))

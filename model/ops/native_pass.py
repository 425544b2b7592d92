"""A Batch as the native kernels read it (native/pass.h): token ids, positions, block tables in one array."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from model.batch import Batch
from model.ops import library

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Pass:
    """The C structure, with the memory that it points at."""

    struct: library.Pass
    memory: tuple["array[int]", ...]

    @classmethod
    def of(cls, batch: Batch, selected: Sequence[int] = (), *, narrows: bool = False) -> "Pass":
        """Lay a batch out; the rows stand in the order of its chunks, and some are selected.

        If it narrows, only those are computed to the end.
        """
        chunks = batch.chunks
        token_ids: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        lengths: list[int] = []
        width = 0
        for number, chunk in enumerate(chunks):
            start, stop = chunk.start, chunk.stop
            lengths.append(stop)
            token_ids += chunk.token_ids[start:stop]
            positions += range(start, stop)
            sequences += repeat(number, stop - start)
            for table in chunk.block_tables:
                assert len(table) * BLOCK_SIZE >= stop  # the kernels trust us
                width = max(width, len(table))
        tables: list[int] = []
        for group in zip(*(chunk.block_tables for chunk in chunks), strict=True):
            for table in group:
                tables += table
                tables += repeat(0, width - len(table))
        adapters = [chunk.adapter for chunk in chunks]
        # One array is one conversion and one address; Python's own is the fastest for a few hundred numbers.
        parts = (token_ids, positions, sequences, lengths, tables, selected, adapters)
        memory = array("i", chain.from_iterable(parts))
        pointers, place = [], memory.buffer_info()[0]
        for part in parts:
            pointers.append(place)
            place += len(part) * memory.itemsize
        if not any(adapters):
            pointers[-1] = 0
        struct = library.Pass(len(positions), len(selected), width, len(chunks), *pointers, narrows)
        return cls(struct, (memory,))

    @classmethod
    def empty(cls) -> "Pass":
        """A pass of no rows."""
        return cls(library.Pass(), ())

    def select(self, rows: Sequence[int]) -> "Pass":
        """The same pass with these rows selected."""
        memory = array("i", rows)
        struct = library.Pass.from_buffer_copy(self.struct)
        struct.selected = len(rows)
        struct.selection = memory.buffer_info()[0]
        return Pass(struct, (*self.memory, memory))

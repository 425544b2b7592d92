"""Low-rank pairs as the native kernels read them (native/low_rank.h): fp16 in panels of 16 outputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import memory
from model.ops import library
from model.ops.base import LowRank
from model.ops.panels import LANES, check_range


@dataclass(frozen=True, slots=True)
class AdapterPanels:
    """The pairs of one product, with the memory that they point at."""

    pairs: tuple[library.LowRank, ...]
    width: int
    """Inner numbers (A x) that a row has at most."""
    memory: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return sum(tensor.nbytes for tensor in self.memory)

    @classmethod
    def of(cls, pairs: Sequence[LowRank]) -> "AdapterPanels":
        """Round and lay out (ValueError for a number beyond fp16)."""
        made, memory, widths = [], [], dict.fromkeys((pair.adapter for pair in pairs), 0)
        for pair in pairs:
            a = _panels(pair.a)  # [rank / 16, in, 16]
            rank = len(a) * LANES
            b = _panels(F.pad(pair.b, (0, rank - pair.b.shape[1])))  # [outputs / 16, rank, 16]
            widths[pair.adapter] += rank
            memory += [a, b]
            sizes = (pair.adapter, rank, pair.first, len(b) * LANES)
            made.append(library.LowRank(a.data_ptr(), b.data_ptr(), *sizes))
        return cls(tuple(made), max(widths.values()), tuple(memory))


def _panels(matrix: Tensor) -> Tensor:
    """[outputs, inputs] -> [outputs / 16, inputs, 16] in fp16, outputs filled up with zeros."""
    check_range(float(matrix.abs().max()), torch.float16)
    outputs, inputs = matrix.shape
    rows = F.pad(matrix, (0, 0, 0, -outputs % LANES))
    panels = memory.zeros((rows.numel() // inputs // LANES, inputs, LANES), torch.float16)
    return panels.copy_(rows.view(-1, LANES, inputs).transpose(1, 2))

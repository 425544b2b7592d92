"""AWQ (arXiv:2306.00978) as AutoAWQ writes it for its GEMM kernels.

`qweight` [in, out / 8] and `qzeros` [groups, out / 8] pack four bits each of eight outputs into a word, in
the order 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits on; `scales` [groups, out].
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.dialects.fields import MOST_WIDTH, Fields
from model.weights.quantised.pieces import (
    FLOATS,
    Format,
    Piece,
    Shape,
    count_groups,
    in_bytes,
    in_groups,
    two_axes,
)
from model.weights.stored import StoredTensor

_IN_WORD = 8
_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Where each of eight outputs is among the low halves of its word's four bytes, then the high halves."""


@dataclass(frozen=True, slots=True)
class _Awq:
    size: int | None

    @property
    def pieces(self) -> Mapping[str, Piece]:
        return {"qweight": Piece(("I32",)), "qzeros": Piece(("I32",)), "scales": Piece(FLOATS)}

    def layout(self, values: Shape, kinds: Mapping[str, str]) -> tuple[Shape, Mapping[str, Shape]]:
        inputs, words = two_axes(values)
        groups, outputs = count_groups(inputs, self.size), words * _IN_WORD
        return (outputs, inputs), {"qzeros": (groups, words), "scales": (groups, outputs)}

    def read(self, shape: tuple[int, int], pieces: Mapping[str, Tensor]) -> StoredTensor:
        words = pieces["qweight"]
        zeros = _outputs(pieces["qzeros"], torch.arange(shape[0]))
        return in_groups(shape, 4, lambda rows: _outputs(words, rows), pieces["scales"].t(), zeros)


def _outputs(words: Tensor, rows: Tensor) -> Tensor:
    """int32 [n, out / 8] and numbers of outputs -> bytes [outputs, n]."""
    column = rows // _IN_WORD
    first = int(column.min())
    some = words[:, first : int(column.max()) + 1].t()
    packed = in_bytes(some).transpose(1, 2).contiguous()  # [words, 4, n]
    halves = torch.cat((packed & 15, packed >> 4), dim=1).flatten(0, 1)  # [words * 8, n]
    return halves[(column - first) * _IN_WORD + torch.tensor(_PLACES)[rows % _IN_WORD]]


def from_awq(fields: Fields) -> Format:
    """Read a `quantization_config` of `awq`; ModelError for what is not served."""
    fields.neutral({"bits": 4, "zero_point": True, "pack_dtype": "int32"})
    fields.neutral(dict.fromkeys(("version", "format", "checkpoint_format"), "gemm"))
    return _Awq(None if fields.get("group_size") == -1 else fields.count("group_size", MOST_WIDTH))

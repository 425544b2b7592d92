"""GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel write it.

`qweight` [in * bits / 32, out] packs eight (or four) inputs of one output into a word, `qzeros`
[groups, out * bits / 32] as many outputs' zero points, lowest bits first; `scales` [groups, out];
`g_idx` [in], the group of each input. Format `gptq` stores zero points less one, `gptq_v2` as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from model.dialects.fields import MOST_WIDTH, Fields
from model.weights.quantised.pieces import (
    FLOATS,
    Format,
    Piece,
    Shape,
    count_groups,
    in_groups,
    two_axes,
    unpacked,
)
from model.weights.stored import StoredTensor

_ONES = {4: 0x11111111, 8: 0x01010101}
"""What format `gptq` takes from each word of zero points; one that is 0 borrows from the next, so only the
word as a whole gives them back."""


@dataclass(frozen=True, slots=True)
class _Gptq:
    bits: int
    size: int | None
    less_one: bool

    @property
    def pieces(self) -> Mapping[str, Piece]:
        return {
            "qweight": Piece(("I32",)),
            "qzeros": Piece(("I32",)),
            "scales": Piece(FLOATS),
            "g_idx": Piece(("I32", "I64"), required=False),
        }

    def layout(self, values: Shape, kinds: Mapping[str, str]) -> tuple[Shape, Mapping[str, Shape]]:
        words, outputs = two_axes(values)
        in_word = 32 // self.bits
        inputs = words * in_word
        if outputs % in_word:
            raise ValueError(f"has {outputs} outputs, which are no whole words of {in_word}")
        groups = count_groups(inputs, self.size)
        wanted: dict[str, Shape] = {
            "qzeros": (groups, outputs // in_word),
            "scales": (groups, outputs),
            "g_idx": (inputs,),
        }
        return (outputs, inputs), wanted

    def read(self, shape: tuple[int, int], pieces: Mapping[str, Tensor]) -> StoredTensor:
        words, scales, zeros = pieces["qweight"], pieces["scales"].t(), pieces["qzeros"]
        if self.less_one:
            zeros = zeros + _ONES[self.bits]
        zeros = unpacked(zeros, self.bits).t()

        def values(rows: Tensor) -> Tensor:
            return unpacked(words[:, rows].t(), self.bits)

        return in_groups(shape, self.bits, values, scales, zeros, pieces.get("g_idx"))


def from_gptq(fields: Fields) -> Format:
    """Read a `quantization_config` of `gptq`; ModelError for what is not served."""
    if fields.get("bits") not in (4, 8):
        raise fields.refusal("bits", "4 or 8 (nothing else is served)")
    name = "format" if fields.get("checkpoint_format") is None else "checkpoint_format"
    format = fields.word(name, ("gptq", "gptq_v2"), "gptq")
    fields.neutral({"is_marlin_format": False, "pack_dtype": "int32"})
    if fields.get("dynamic"):  # bits and groups by module
        raise fields.refusal("dynamic", "empty or absent (nothing else is served)")
    bits = fields.count("bits", 8)
    size = None if fields.get("group_size") == -1 else fields.count("group_size", MOST_WIDTH)
    return _Gptq(bits, size, format == "gptq")

"""ggml's block formats, decoded: the common ones here, all others by the `gguf` package.

Bit for bit as `gguf.quants` has them, and about twice as fast. The layouts are ggml's, in ggml-common.h.
"""

from collections.abc import Callable

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from model.weights.stored import Integers

_VALUES_AT_ONCE = 1 << 17
"""Values decoded at once: half a MiB stays in a core's cache, and calls into torch cost little beside it."""

_CODEBOOK_4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""IQ4's sixteen values (`kvalues_iq4nl`)."""


def decode_rows(kind: GGMLQuantizationType, rows: Tensor, width: int) -> Tensor:
    """Bytes [rows, bytes of a row] -> float32 [rows, width]; NotImplementedError if gguf cannot."""
    values = torch.empty(len(rows), width)
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    blocks, out = rows.reshape(-1, block_bytes), values.view(-1, block_values)
    step = _VALUES_AT_ONCE // block_values
    decode, integers = _DECODERS.get(kind), INTEGERS.get(kind)
    for start in range(0, len(blocks), step):
        some = blocks[start : start + step]
        if integers is not None:
            out[start : start + step] = integers.decode(some, block_values)
        elif decode is not None:
            decode(some, out[start : start + step])
        else:
            decoded = torch.from_numpy(dequantize(some.flatten().numpy(), kind))
            out[start : start + step] = decoded.view(-1, block_values)
    return values


def _half(blocks: Tensor, start: int) -> Tensor:
    """Return the float16 at a byte of each block as float32 [blocks, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _planes(packed: Tensor, bits: int) -> Tensor:
    """Take bytes apart, [..., bytes] -> [..., 8 / bits, bytes]: first the lowest bits of all of them."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (packed.unsqueeze(-2) >> shifts[:, None]) & ((1 << bits) - 1)


def _fields(packed: Tensor, bits: int) -> Tensor:
    """Take bytes apart, [..., bytes] -> [..., bytes * 8 / bits]: first all bits of the first of them."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


# Blocks of 32: [blocks, bytes of a block] into float32 [blocks, 32].
def _decode_q4_0(blocks: Tensor, out: Tensor) -> None:
    out.view(-1, 2, 16).copy_(_planes(blocks[:, 2:], 4))
    out.sub_(8).mul_(_half(blocks, 0))


def _decode_q4_1(blocks: Tensor, out: Tensor) -> None:
    out.view(-1, 2, 16).copy_(_planes(blocks[:, 4:], 4))
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _decode_q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0))


# Super-blocks of 256, in groups of 16 or 32 that have scales of few bits: into float32 [blocks, 256].
def _decode_q2_k(blocks: Tensor, out: Tensor) -> None:
    scales, mins = blocks[:, :16] & 15, blocks[:, :16] >> 4
    quants = _planes(blocks[:, 16:80].view(-1, 2, 32), 2).view(-1, 16, 16)
    groups = out.view(-1, 16, 16).copy_(quants)
    groups.mul_((scales * _half(blocks, 80)).unsqueeze(2)).sub_((mins * _half(blocks, 82)).unsqueeze(2))


def _decode_q6_k(blocks: Tensor, out: Tensor) -> None:
    low = _planes(blocks[:, :128].view(-1, 2, 64), 4).view(-1, 2, 4, 32)
    quants = low | _planes(blocks[:, 128:192].view(-1, 2, 32), 2) << 4
    scales = blocks[:, 192:208].view(torch.int8) * _half(blocks, 208)
    out.view(-1, 16, 16).copy_(quants.view(-1, 16, 16)).sub_(32).mul_(scales.unsqueeze(2))


_DECODERS: dict[GGMLQuantizationType, Callable[[Tensor, Tensor], None]] = {
    GGMLQuantizationType.Q4_0: _decode_q4_0,
    GGMLQuantizationType.Q4_1: _decode_q4_1,
    GGMLQuantizationType.Q8_0: _decode_q8_0,
    GGMLQuantizationType.Q2_K: _decode_q2_k,
    GGMLQuantizationType.Q6_K: _decode_q6_k,
}


# Integers in groups that have a scale, and a minimum or a zero point: blocks to [blocks, numbers], scales and
# minima or zero points [blocks, groups].
def _unpack_q5_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _with_zero(_five_bits(blocks[:, 2:]), _half(blocks, 0), 16)


def _with_zero(values: Tensor, scales: Tensor, zero: int) -> tuple[Tensor, Tensor, Tensor]:
    return values, scales, torch.full_like(scales, zero)


def _unpack_q5_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _five_bits(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _five_bits(packed: Tensor) -> Tensor:
    """[blocks, 4 bytes of fifth bits and 16 of the others] -> [blocks, 32]."""
    return _planes(packed[:, 4:], 4).view(-1, 32) | _fields(packed[:, :4], 1) << 4


def _unpack_q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (_planes(blocks[:, 16:].view(-1, 4, 32), 4).view(-1, 256), *_scales_and_minima(blocks))


def _unpack_q5_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low = _planes(blocks[:, 48:].view(-1, 4, 32), 4).view(-1, 256)
    return (low | _planes(blocks[:, 16:48], 1).view(-1, 256) << 4, *_scales_and_minima(blocks))


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Those of Q4_K and Q5_K, float32 [blocks, 8]: eight pairs of six bits, times two halves."""
    scales, minima, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((scales & 63, (rest & 15) | (scales >> 2 & 48)), dim=1)
    minima = torch.cat((minima & 63, (rest >> 4) | (minima >> 2 & 48)), dim=1)
    return scales * _half(blocks, 0), -(minima * _half(blocks, 2))


def _unpack_q3_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Its scales of six bits, one for 16 numbers, times its numbers of three are whole: from -124 to 128."""
    low = _planes(blocks[:, 32:96].view(-1, 2, 32), 2).view(-1, 8, 32)
    quants = (low | _planes(blocks[:, :32], 1) << 2).view(-1, 16, 16).view(torch.int8) - 4
    scales = _planes(blocks[:, 96:104], 4) | _planes(blocks[:, 104:108], 2).view(-1, 2, 8) << 4
    scales = scales.view(-1, 16, 1).view(torch.int8) - 32
    values = (quants.short() * scales + 124).to(torch.uint8).view(-1, 256)
    return _with_zero(values, _half(blocks, 108), 124)


def _unpack_iq4_nl(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _with_zero(_looked_up(_planes(blocks[:, 2:], 4).view(-1, 32)), _half(blocks, 0), 127)


def _unpack_iq4_xs(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales = _fields(blocks[:, 4:8], 4) | _fields(blocks[:, 2:4], 2) << 4
    scales = (scales.view(torch.int8) - 32) * _half(blocks, 0)
    return _with_zero(_looked_up(_planes(blocks[:, 8:].view(-1, 8, 16), 4).view(-1, 256)), scales, 127)


def _looked_up(indices: Tensor) -> Tensor:
    """The codebook's values and 127."""
    codebook = torch.tensor([value + 127 for value in _CODEBOOK_4], dtype=torch.uint8)
    return codebook[indices.int()]


def _integers(
    kind: GGMLQuantizationType,
    bits: int,
    unpack: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    *,
    size: int = 32,
    zero_points: bool = False,
) -> Integers:
    """A format of the above for whole rows of blocks."""

    def unpack_rows(rows: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        values, scales, offsets = unpack(rows.reshape(-1, GGML_QUANT_SIZES[kind][1]))
        return values.view(len(rows), width), scales.view(len(rows), -1), offsets.view(len(rows), -1)

    return Integers(bits, size, zero_points, unpack_rows)


INTEGERS = {
    GGMLQuantizationType.Q5_0: _integers(GGMLQuantizationType.Q5_0, 8, _unpack_q5_0, zero_points=True),
    GGMLQuantizationType.Q5_1: _integers(GGMLQuantizationType.Q5_1, 8, _unpack_q5_1),
    GGMLQuantizationType.Q4_K: _integers(GGMLQuantizationType.Q4_K, 4, _unpack_q4_k),
    GGMLQuantizationType.Q5_K: _integers(GGMLQuantizationType.Q5_K, 8, _unpack_q5_k),
    GGMLQuantizationType.Q3_K: _integers(
        GGMLQuantizationType.Q3_K, 8, _unpack_q3_k, size=256, zero_points=True
    ),
    GGMLQuantizationType.IQ4_NL: _integers(GGMLQuantizationType.IQ4_NL, 8, _unpack_iq4_nl, zero_points=True),
    GGMLQuantizationType.IQ4_XS: _integers(GGMLQuantizationType.IQ4_XS, 8, _unpack_iq4_xs, zero_points=True),
}
"""Formats that are integers in groups, which an op set may keep as such."""

"""A tensor as it stands in a file: plain numbers, or blocks that an op set may take as they are."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_LARGE = 1 << 23
"""Numbers of a matrix from which on it is not mapped as a whole."""


@dataclass(frozen=True, slots=True)
class Integers:
    """How blocks are unsigned integers u in groups of a row: scale * u + minimum, or scale * (u - zero)."""

    bits: int
    """Of u: 4 or 8."""
    size: int
    """Numbers that share a scale; a row is whole groups."""
    zero_points: bool
    """Whether a group has a zero point, a whole number from 0 to 256, and not a minimum."""
    unpack: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
    """Blocks [rows, ...] and numbers a row -> u as bytes [rows, numbers], and in float32 the scales and the
    minima or zero points [rows, groups]."""

    def decode(self, blocks: Tensor, width: int) -> Tensor:
        """Blocks [rows, ...] and numbers a row -> float32 [rows, numbers]."""
        values, scales, offsets = self.unpack(blocks, width)
        groups = values.view(len(values), -1, self.size).to(torch.float32)
        scales, offsets = scales[:, :, None], offsets[:, :, None]
        if self.zero_points:
            groups.sub_(offsets).mul_(scales)
        else:
            groups.mul_(scales).add_(offsets)
        return groups.view(len(values), width)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint; its data may be a view of the mapped file."""

    shape: tuple[int, ...]
    """As in torch: the contiguous dimension last."""
    kind: str
    """F32, F16, BF16, or the name of a block format, GGUF's or ours."""
    data: Tensor
    """Plain numbers of that shape; blocks as bytes [rows, bytes of a row], a row being the last dimension; or
    the rows' own numbers [rows], where a format has a row's parts in several places."""
    decode: Callable[[Tensor, int], Tensor] | None = None
    """Blocks [rows, bytes of a row] and numbers a row -> float32 [rows, numbers]; None if plain."""
    integers: Integers | None = None
    """Set for blocks that are integers in groups."""

    @classmethod
    def plain(cls, tensor: Tensor) -> "StoredTensor":
        """A tensor that needs no decoding."""
        return cls(tuple(tensor.shape), PLAIN[tensor.dtype], tensor)

    @classmethod
    def in_rows(
        cls,
        shape: tuple[int, int],
        kind: str,
        decode: Callable[[Tensor, int], Tensor],
        integers: Integers | None = None,
    ) -> "StoredTensor":
        """A matrix whose rows are read by their numbers."""
        return cls(shape, kind, torch.arange(shape[0]), decode, integers)

    @classmethod
    def mapped(cls, shape: tuple[int, ...], kind: str, read: Callable[[int, int], Tensor]) -> "StoredTensor":
        """Plain numbers of a file, of which `read` maps the rows from one to before another.

        A large matrix is not mapped as a whole: the pages of some rows go before the next are read.
        """
        if len(shape) != 2 or math.prod(shape) < _LARGE:
            return cls.plain(read(0, shape[0] if shape else 1))

        def decode(rows: Tensor, width: int) -> Tensor:
            first, last = int(rows.min()), int(rows.max())
            found = read(first, last + 1)
            in_order = len(rows) == len(found) and bool((rows.diff() == 1).all())
            return found if in_order else found[rows - first]

        return cls.in_rows((shape[0], shape[1]), kind, decode)

    @property
    def is_plain(self) -> bool:
        """Whether the data are the numbers themselves."""
        return self.decode is None

    def dequantise(self) -> Tensor:
        """As stored if plain, else decoded to float32; raises ModelError for a format that has no decoder."""
        if self.decode is None:
            return self.data
        return self.decode(self.data, self.shape[-1]).view(self.shape)

    def in_parts(self, numbers: int, unit: int = 1) -> Iterator[tuple[int, "StoredTensor"]]:
        """Rows in order, in parts of about so many numbers and whole units of rows, and where each begins."""
        step = max(1, numbers // math.prod(self.shape[1:]) // unit) * unit
        for start in range(0, self.shape[0], step):
            yield start, self.rows(slice(start, min(start + step, self.shape[0])))

    def expert(self, index: int) -> "StoredTensor":
        """One entry of the first axis."""
        rows = math.prod(self.shape[1:-1])
        data = self.data[index] if self.is_plain else self.data[index * rows : (index + 1) * rows]
        return replace(self, shape=self.shape[1:], data=data)

    def rows(self, rows: slice | Tensor) -> "StoredTensor":
        """Some rows, or other orders of them; the numbers of a vector count as rows."""
        data = self.data[rows]
        return replace(self, shape=(len(data), *self.shape[1:]), data=data)

    def plus_one(self) -> "StoredTensor":
        """The numbers and one, in float32."""
        return StoredTensor.plain(self.dequantise().to(torch.float32) + 1)

"""Weights that stand in several pieces, shown as one tensor `<module>.weight` of shape [out, in].

It is strict: each piece is there with its type and shape, or opening fails by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from model.errors import ModelError
from model.weights.checkpoint import TensorFiles, shown
from model.weights.stored import Integers, StoredTensor

Shape = tuple[int, ...]

FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Piece:
    """One of a weight's tensors."""

    kinds: tuple[str, ...]
    """The number types that it may have, in safetensors' words."""
    required: bool = True


class Format(Protocol):
    """How one module's weight is stored."""

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """By the last part of their names; a module that has the first, of that type, is quantised."""

    def layout(self, values: Shape, kinds: Mapping[str, str]) -> tuple[Shape, Mapping[str, Shape]]:
        """From the first piece's shape and all pieces' types: the shapes of the weight and of the others.

        ValueError if there is no such weight.
        """

    def read(self, shape: tuple[int, int], pieces: Mapping[str, Tensor]) -> StoredTensor:
        """The weight; ValueError for what the pieces must not hold."""


class RawFiles(TensorFiles, Protocol):
    """Files whose tensors may be of any type."""

    kinds: dict[str, str]
    """Number types by tensor, in safetensors' words."""

    def tensor(self, name: str) -> Tensor:
        """One tensor as it stands there."""


class QuantisedFiles:
    """Files with quantised modules as TensorFiles (see checkpoint.py) without."""

    def __init__(self, files: RawFiles, format: Format) -> None:
        """Check every module's pieces (ModelError)."""
        self.path = files.path
        self._files = files
        self._format = format
        self.shapes: dict[str, Shape] = {}
        self.kinds: dict[str, str] = {}
        """Number types of what is not quantised."""
        self._modules: dict[str, dict[str, str]] = {}
        main = next(iter(format.pieces))
        modules = {
            name.removesuffix(f".{main}")
            for name, kind in files.kinds.items()
            if name.endswith(f".{main}") and kind in format.pieces[main].kinds
        }
        for name, shape in files.shapes.items():
            module, _, end = name.rpartition(".")
            if module in modules and end == main:
                self._modules[f"{module}.weight"] = self._pieces(module)
                self.shapes[f"{module}.weight"] = self._check(module)
            elif module in modules and end == "weight":
                raise self._refusal(name, f"stands beside {module}.{main}; one of the two must go")
            elif end == "weight" or end not in format.pieces:
                self.shapes[name], self.kinds[name] = shape, files.kinds[name]
            elif module not in modules:
                kinds = " or ".join(format.pieces[main].kinds)
                raise self._refusal(name, f"has no {module}.{main} of type {kinds} beside it")

    def file_of(self, name: str) -> Path:
        """The file that has a weight's values (TensorFiles.file_of)."""
        pieces = self._modules.get(name)
        return self._files.file_of(name if pieces is None else next(iter(pieces.values())))

    def read(self, name: str) -> StoredTensor:
        """One tensor, whole (TensorFiles.read)."""
        pieces = self._modules.get(name)
        if pieces is None:
            return self._files.read(name)
        outputs, inputs = self.shapes[name]
        try:
            tensors = {end: self._files.tensor(piece) for end, piece in pieces.items()}
            return self._format.read((outputs, inputs), tensors)
        except ValueError as error:
            values = next(iter(pieces.values()))
            raise self._refusal(values, f"{error}; download the checkpoint again") from None

    def _pieces(self, module: str) -> dict[str, str]:
        """Give the names of a module's pieces by their ends."""
        found = {}
        for end, piece in self._format.pieces.items():
            name = f"{module}.{end}"
            if name not in self._files.shapes:
                if piece.required:
                    raise self._refusal(name, "is missing; download the checkpoint again")
            elif self._files.kinds[name] not in piece.kinds:
                wanted = " or ".join(piece.kinds)
                raise self._refusal(name, f"is of type {self._files.kinds[name]}, it must be {wanted}")
            else:
                found[end] = name
        return found

    def _check(self, module: str) -> Shape:
        """Give the weight's shape, which all pieces must fit."""
        pieces = self._modules[f"{module}.weight"]
        values, *others = pieces
        shapes, kinds = self._files.shapes, self._files.kinds
        try:
            kinds_found = {end: kinds[name] for end, name in pieces.items()}
            whole, wanted = self._format.layout(shapes[pieces[values]], kinds_found)
        except ValueError as error:
            what = f"{error}; check quantization_config in config.json"
            raise self._refusal(pieces[values], what) from None
        for end in others:
            found = shapes[pieces[end]]
            if (found or (1,)) != wanted[end]:
                raise self._refusal(
                    pieces[end],
                    f"has shape {list(found)}, but {values} of {list(shapes[pieces[values]])} and"
                    f" quantization_config ask for {list(wanted[end])}",
                )
        return whole

    def _refusal(self, name: str, what: str) -> ModelError:
        return ModelError(f"{self.file_of(name)}: the tensor {shown(name)} {what}")


def two_axes(shape: Shape) -> tuple[int, int]:
    """The sizes of a matrix (ValueError)."""
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"has shape {list(shape)} and is no matrix")
    return shape[0], shape[1]


def count_groups(inputs: int, size: int | None) -> int:
    """Groups along a row of so many inputs; a size of None is the whole row (ValueError)."""
    if size is not None and inputs % size:
        raise ValueError(f"has rows of {inputs} inputs, which are no whole groups of {size}")
    return 1 if size is None else inputs // size


def in_bytes(words: Tensor) -> Tensor:
    """int32 [...] -> bytes [..., 4], the lowest first."""
    return words.reshape(-1).view(torch.uint8).view(*words.shape, 4)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, words] -> bytes [rows, words * 32 / bits], a word's lowest bits first."""
    packed = in_bytes(words).flatten(1)
    return packed if bits == 8 else torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def in_groups(
    shape: tuple[int, int],
    bits: int,
    values: Callable[[Tensor], Tensor],
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor | None = None,
) -> StoredTensor:
    """A weight scale * (u - zero): `values` gives u by row numbers, scales and zeros are [out, groups].

    `group_of` says which group each input is of, where the order of quantising set it. If that is
    not theirs one after another, the weight has no form but its numbers.
    """
    inputs, groups = shape[1], scales.shape[1]
    size = inputs // groups

    def unpack(rows: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        return values(rows), scales[rows].to(torch.float32), zeros[rows].to(torch.float32)

    if group_of is None or torch.equal(group_of.long(), torch.arange(inputs) // size):
        integers = Integers(bits, size, True, unpack)
        return StoredTensor.in_rows(shape, f"INT{bits}", integers.decode, integers)
    order = group_of.long()
    if not 0 <= int(order.min()) <= int(order.max()) < groups:
        raise ValueError(f"has inputs of a group that is none of its {groups}")

    def decode(rows: Tensor, width: int) -> Tensor:
        numbers, some_scales, some_zeros = unpack(rows, width)
        return (numbers.to(torch.float32) - some_zeros[:, order]).mul_(some_scales[:, order])

    return StoredTensor.in_rows(shape, f"INT{bits} act-order", decode)

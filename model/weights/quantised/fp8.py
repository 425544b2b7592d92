"""Weights in floating point of 8 bits (arXiv:2209.05433), as transformers and vLLM write them.

`weight` [out, in], and one scale a tensor, an output or a block: `weight_scale` or `weight_scale_inv`,
whoever wrote it; either is what a stored number is multiplied by. Once read they are plain numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.dialects.fields import MOST_WIDTH, Fields
from model.weights.quantised.pieces import FLOATS, Format, Piece, Shape, two_axes
from model.weights.stored import StoredTensor

_SCALES = ("weight_scale", "weight_scale_inv")
_KINDS = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}


@dataclass(frozen=True, slots=True)
class Float8:
    """Weights of one floating-point byte each."""

    block: tuple[int | None, int | None]
    """Outputs and inputs that share a scale; None for all of them."""

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """See Format, as for the rest."""
        return {"weight": Piece(tuple(_KINDS.values()))} | dict.fromkeys(
            _SCALES, Piece(FLOATS, required=False)
        )

    def layout(self, values: Shape, kinds: Mapping[str, str]) -> tuple[Shape, Mapping[str, Shape]]:
        """Scales are [blocks of outputs, blocks of inputs], or a single number."""
        sizes = two_axes(values)
        if sum(name in kinds for name in _SCALES) != 1:
            raise ValueError(f"must have one of {' and '.join(_SCALES)} beside it")
        blocks = tuple(-(-size // (step or size)) for size, step in zip(sizes, self.block, strict=True))
        return sizes, dict.fromkeys(_SCALES, (1,) if self.block == (None, None) else blocks)

    def read(self, shape: tuple[int, int], pieces: Mapping[str, Tensor]) -> StoredTensor:
        """The stored number times its scale, in float32."""
        weight = pieces["weight"]
        (scale,) = (pieces[name].to(torch.float32) for name in _SCALES if name in pieces)
        outputs, inputs = (step or size for step, size in zip(self.block, shape, strict=True))
        scales = scale.view(-(-shape[0] // outputs), -(-shape[1] // inputs))
        column = torch.arange(shape[1]) // inputs

        def decode(rows: Tensor, width: int) -> Tensor:
            numbers = weight.view(torch.uint8)[rows].view(weight.dtype).to(torch.float32)
            factors = scales[rows // outputs]
            return numbers.mul_(factors[:, column] if factors.shape[1] > 1 else factors)

        return StoredTensor.in_rows(shape, _KINDS[weight.dtype], decode)


def from_fp8(fields: Fields) -> Format:
    """Read a `quantization_config` of `fp8`; ModelError for what is not served.

    Products of quantised activations are how some hardware multiplies: ours take them as they are, so
    `dynamic` says nothing about the weights; `static` would have scales that nobody reads.
    """
    fields.neutral({"activation_scheme": "dynamic", "scale_fmt": "float", "expert_dtype": "fp8"})
    if fields.get("weight_block_size") is None:
        return Float8((None, None))
    return Float8(block_sizes(fields, "weight_block_size"))


def block_sizes(fields: Fields, name: str) -> tuple[int, int]:
    """Outputs and inputs of a block (ModelError)."""
    value = fields.get(name)
    if isinstance(value, list) and len(value) == 2:
        sizes = Fields({f"{name}[{i}]": size for i, size in enumerate(value)}, fields.where)
        return sizes.count(f"{name}[0]", MOST_WIDTH), sizes.count(f"{name}[1]", MOST_WIDTH)
    raise fields.refusal(name, "a list of two sizes")

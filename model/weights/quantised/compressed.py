"""The formats of compressed-tensors (vLLM's), as far as weights alone are quantised.

`pack-quantized`: `weight_packed` [out, in * bits / 32], a word's lowest bits first, each 2^(bits - 1) above
what it stands for; `int-quantized`: `weight` in int8. Both have `weight_scale` [out, groups], and zero points
if they are not symmetric. `float-quantized`: `weight` in float8 (fp8.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.dialects.fields import MOST_WIDTH, Fields
from model.weights.quantised.fp8 import Float8, block_sizes
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


@dataclass(frozen=True, slots=True)
class _Integers:
    """Weights in integers of 4 or 8 bits, packed into words or each in a byte."""

    bits: int
    packed: bool
    symmetric: bool
    size: int | None
    """Inputs that share a scale; None for all of a row."""
    whole: bool
    """Whether a single scale serves the whole tensor."""

    @property
    def pieces(self) -> Mapping[str, Piece]:
        shared = {
            "weight_scale": Piece(FLOATS),
            "weight_zero_point": Piece(("I8", "I32")[: 1 + self.packed], required=not self.symmetric),
            "weight_g_idx": Piece(("I32", "I64"), required=False),
        }
        if self.packed:
            return {"weight_packed": Piece(("I32",)), "weight_shape": Piece(("I32", "I64")), **shared}
        return {"weight": Piece(("I8",)), **shared}

    def layout(self, values: Shape, kinds: Mapping[str, str]) -> tuple[Shape, Mapping[str, Shape]]:
        outputs, columns = two_axes(values)
        inputs = columns * 32 // self.bits if self.packed else columns
        scales = (1,) if self.whole else (outputs, count_groups(inputs, self.size))
        zeros = scales
        if kinds.get("weight_zero_point") == "I32":  # packed along the outputs
            zeros = (-(-outputs * self.bits // 32), scales[-1])
        wanted: dict[str, Shape] = {
            "weight_scale": scales,
            "weight_zero_point": zeros,
            "weight_shape": (2,),
            "weight_g_idx": (inputs,),
        }
        return (outputs, inputs), wanted

    def read(self, shape: tuple[int, int], pieces: Mapping[str, Tensor]) -> StoredTensor:
        outputs = shape[0]
        said = pieces.get("weight_shape")
        if said is not None and said.tolist() != list(shape):
            raise ValueError(f"is {list(shape)}, but its weight_shape says {said.tolist()}")
        scales = pieces["weight_scale"].view(-1, 1 if self.whole else pieces["weight_scale"].shape[-1])
        group_of = pieces.get("weight_g_idx")
        if group_of is not None and int(group_of.max()) < 0:  # the place was kept and not used
            group_of = None
        # Zero stands in the middle of a word's part, and of a byte once its sign is turned.
        middle = 1 << (self.bits - 1) if self.packed else 128
        points = pieces.get("weight_zero_point")
        if points is None:
            zeros = torch.full_like(scales, middle)
        elif points.dtype == torch.int32:
            zeros = unpacked(points.t(), self.bits)[:, :outputs].t()
        else:
            zeros = points.view(scales.shape).short() + middle
        values = pieces["weight_packed" if self.packed else "weight"]

        def some(rows: Tensor) -> Tensor:
            if self.packed:
                return unpacked(values[rows], self.bits)
            return values.view(torch.uint8)[rows] ^ 128

        scales, zeros = scales.expand(outputs, -1), zeros.expand(outputs, -1)
        return in_groups(shape, self.bits if self.packed else 8, some, scales, zeros, group_of)


def from_compressed(fields: Fields) -> Format:
    """Read a `quantization_config` of `compressed-tensors`; ModelError for what is not served.

    Which modules are quantised their tensors say, so `targets` and `ignore` say nothing more.
    """
    format = fields.word("format", ("pack-quantized", "int-quantized", "float-quantized"))
    fields.word("quantization_status", ("compressed", "frozen"), "compressed")
    fields.neutral({"kv_cache_scheme": None})
    for name in ("sparsity_config", "transform_config"):
        if fields.get(name):
            raise fields.refusal(name, "empty or absent (nothing else is served)")
    groups = fields.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise fields.refusal("config_groups", "an object with a scheme")
    where = f"{fields.where}: config_groups"
    formats = [_scheme(group, format, f"{where}.{ascii(name)[:60]}") for name, group in groups.items()]
    if any(other != formats[0] for other in formats):
        raise fields.refusal("config_groups", "of one scheme (a mixture is not served)")
    return formats[0]


def _scheme(group: object, format: str, where: str) -> Format:
    scheme = Fields(group if isinstance(group, Mapping) else {}, where)
    scheme.neutral({"output_activations": None, "format": format})
    floating = format == "float-quantized"
    activations = scheme.get("input_activations")
    # What fp8.py says of activations in float8 holds here; those in integers belong to the model's own error.
    dynamic = isinstance(activations, Mapping) and activations.get("dynamic") is True
    if activations is not None and not (floating and dynamic):
        wanted = "null, or have dynamic true" if floating else "null"
        raise scheme.refusal("input_activations", f"{wanted} (nothing else is served)")
    weights = scheme.get("weights")
    fields = Fields(weights if isinstance(weights, Mapping) else {}, f"{where}.weights")
    fields.word("type", ("float" if floating else "int",), "int")
    fields.neutral({"dynamic": False})
    size = None if fields.get("group_size") in (None, -1) else fields.count("group_size", MOST_WIDTH)
    default = "group" if size is not None else "tensor" if fields.get("group_size") is None else "channel"
    strategies = ("tensor", "channel", "block") if floating else ("tensor", "channel", "group")
    strategy = fields.word("strategy", strategies, default)
    if floating:
        fields.neutral({"num_bits": 8})
        block = {"tensor": (None, None), "channel": (1, None)}.get(strategy)
        return Float8(block or block_sizes(fields, "block_structure"))
    if fields.get("num_bits") not in (4, 8):
        raise fields.refusal("num_bits", "4 or 8 (nothing else is served)")
    if strategy == "group" and size is None:
        raise fields.refusal("group_size", "the inputs of a group")
    return _Integers(
        bits=fields.count("num_bits", 8),
        packed=format == "pack-quantized",
        symmetric=fields.flag("symmetric", True),
        size=size if strategy == "group" else None,
        whole=strategy == "tensor",
    )

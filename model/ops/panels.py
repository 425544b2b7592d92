"""Weights of the native kernels: matrices in panels (native/panels.h), filled from what a checkpoint stores.

Integers in groups stay the integers that they are, with scale and minimum as float16; plain numbers are
quantised to the width that was asked for, other blocks to 8 bits.
"""

import torch
from torch import Tensor

from model import memory
from model.config import ModelConfig
from model.ops.library import Library, Panels
from model.weights.stored import StoredTensor

LANES = 16
GROUP = 32
MOST_HEAD_DIM = 256

NUMBERS_AT_ONCE = 1 << 18
"""That are decoded on their way into panels: what loading takes beside the model."""

FLOATING_POINT = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Kinds of numbers that go to the bits that were asked for."""

REPACKED = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8}
"""Block formats that the library unpacks itself, by GGUF's number."""

BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
ZERO_POINT = {"Q4_0": 8, "Q4_1": 1, "Q8_0": 128}
"""How many scales below zero a block begins: the panel's minimum, which must be a float16."""


def panel_bits(stored: StoredTensor, plain_bits: int) -> int:
    """The bits of the panels that a tensor goes to, if plain numbers are to have `plain_bits`."""
    if stored.kind in FLOATING_POINT:
        return plain_bits
    if stored.kind in REPACKED:
        return 8 if stored.kind == "Q8_0" else 4
    integers = stored.integers
    # Groups that are cut by a panel's have to be quantised again, and little is lost at 8 bits.
    return integers.bits if integers is not None and integers.size % GROUP == 0 else 8


def unfit(config: ModelConfig) -> str | None:
    """Why the kernels cannot run a model, if they cannot."""
    widths = {"hidden_size": config.hidden_size, "head_dim": config.head_dim}
    if not all(layer.experts for layer in config.layers):
        widths["intermediate_size"] = config.intermediate_size
    if config.experts is not None:
        widths["the experts' intermediate_size"] = config.experts.intermediate_size
        widths["the shared experts' intermediate_size"] = config.experts.shared_intermediate_size
    for name, width in widths.items():
        if width % GROUP:
            return f"{name} {width} is no multiple of {GROUP}"
    if config.head_dim > MOST_HEAD_DIM:
        return f"head_dim {config.head_dim} is above {MOST_HEAD_DIM}"
    return None


class Matrix:
    """A matrix in panels, or a row of parts that are filled one by one, each with its own width of bits."""

    def __init__(self, outputs: int, inputs: int) -> None:
        self.outputs, self.inputs = outputs, inputs
        self.rows = -(-outputs // LANES) * LANES  # a vocabulary may end within a panel
        self.parts: tuple[Matrix, ...] = ()
        self.panels: Panels | None = None
        self._memory: Tensor | None = None

    def fill(self, lib: Library, stored: StoredTensor, plain_bits: int) -> int:
        """Take a stored tensor over, plain numbers in `plain_bits`; gives the bits of the panels.

        ValueError for numbers that panels do not hold.
        """
        kind, integers = stored.kind, stored.integers
        bits = panel_bits(stored, plain_bits)
        panels = self._allocate(lib, bits)
        if kind in REPACKED:
            blocks = stored.data.contiguous()
            scales = blocks.view(-1, BLOCK_BYTES[kind])[:, :2].contiguous().view(torch.float16)
            check_range(float(scales.abs().max()) * ZERO_POINT[kind], torch.float16)
            lib.repack_rows(panels, 0, self.outputs, blocks.data_ptr(), REPACKED[kind])
        elif integers is not None and integers.size % GROUP == 0:
            panels.zero_points = integers.zero_points
            for start, some in stored.in_parts(NUMBERS_AT_ONCE, LANES):
                values, scales, offsets = integers.unpack(some.data, self.inputs)
                values, step = values.contiguous(), integers.size // GROUP
                scales, offsets = (
                    _factors(scales, step),
                    _factors(-offsets if integers.zero_points else offsets, step),
                )
                pointers = values.data_ptr(), scales.data_ptr(), offsets.data_ptr()
                lib.write_groups(panels, start, len(values), *pointers)
        else:
            largest = torch.bfloat16 if bits == 16 else torch.float16
            for start, some in stored.in_parts(NUMBERS_AT_ONCE, LANES):
                numbers = some.dequantise().to(torch.float32).contiguous()
                check_range(float(numbers.abs().max()), largest)
                lib.write_rows(panels, start, len(numbers), numbers.data_ptr())
        return bits

    def _allocate(self, lib: Library, bits: int) -> Panels:
        self._memory = memory.zeros((lib.panel_bytes(self.rows, self.inputs, bits),), torch.uint8)
        self.panels = Panels(self._memory.data_ptr(), self.rows, self.inputs, bits)
        return self.panels

    def segments(self) -> list[Panels]:
        """The panels in order of the outputs."""
        if self.parts:
            return [panels for part in self.parts for panels in part.segments()]
        assert self.panels is not None, "the matrix was never filled"
        return [self.panels]


def _factors(numbers: Tensor, groups: int) -> Tensor:
    """[rows, n] as float16, each for so many groups; ValueError beyond its range."""
    check_range(float(numbers.abs().max()), torch.float16)
    return numbers.to(torch.float16).repeat_interleave(groups, dim=1)


def check_range(largest: float, dtype: torch.dtype) -> None:
    """ValueError if panels of this type do not hold the number."""
    if not largest <= torch.finfo(dtype).max:
        raise ValueError(f"a weight of {largest:.3g} is beyond what panels hold; --kernels torch takes it")

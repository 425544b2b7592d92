"""Weights of the native kernels: matrices in panels (native/panels.h), filled from what a checkpoint stores.

Blocks of 32 that fit are repacked with their exact values; other quantised formats and plain numbers go
to the width that was asked for.
"""

import torch
from torch import Tensor

from model.config import ModelConfig
from model.ops.library import Library, Panels
from model.weights.stored import StoredTensor

LANES = 16
GROUP = 32
MOST_HEAD_DIM = 256

PLAIN_NUMBERS = ("F32", "F16", "BF16")

REPACKED = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8}
"""Block formats that panels hold with their exact values, by GGUF's number."""

BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
ZERO_POINT = {"Q4_0": 8, "Q4_1": 1, "Q8_0": 128}
"""How many scales below zero a block begins: the panel's minimum, which must be a float16."""

FOUR_BITS = {"Q4_0", "Q4_1", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "MXFP4"}
"""Formats that go to 4-bit panels; every other quantised one goes to 8 bits."""


def unfit_shape(config: ModelConfig) -> str | None:
    """Why a model's widths do not fit into panels, if they do not."""
    widths = {
        "hidden_size": (config.hidden_size, GROUP),
        "intermediate_size": (config.intermediate_size, GROUP),
        "head_dim": (config.head_dim, GROUP),
    }
    for name, (width, unit) in widths.items():
        if width % unit:
            return f"{name} {width} is no multiple of {unit}"
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
        kind = stored.kind
        bits = plain_bits if kind in PLAIN_NUMBERS else 4 if kind in FOUR_BITS else 8
        panels = self._allocate(lib, bits)
        if kind in REPACKED:
            blocks = stored.data.contiguous()
            scales = blocks.view(-1, BLOCK_BYTES[kind])[:, :2].contiguous().view(torch.float16)
            _check_range(float(scales.abs().max()) * ZERO_POINT[kind], torch.float16)
            lib.repack_rows(panels, 0, self.outputs, blocks.data_ptr(), REPACKED[kind])
        else:
            numbers = stored.dequantise().to(torch.float32).contiguous()
            _check_range(float(numbers.abs().max()), torch.bfloat16 if bits == 16 else torch.float16)
            lib.write_rows(panels, 0, self.outputs, numbers.data_ptr())
        return bits

    def _allocate(self, lib: Library, bits: int) -> Panels:
        self._memory = aligned(lib.panel_bytes(self.rows, self.inputs, bits), torch.uint8)
        self.panels = Panels(self._memory.data_ptr(), self.rows, self.inputs, bits)
        return self.panels

    def segments(self) -> list[Panels]:
        """The panels in order of the outputs."""
        if self.parts:
            return [panels for part in self.parts for panels in part.segments()]
        assert self.panels is not None, "the matrix was never filled"
        return [self.panels]


def _check_range(largest: float, dtype: torch.dtype) -> None:
    if not largest <= torch.finfo(dtype).max:
        raise ValueError(f"a weight of {largest:.3g} is beyond what panels hold; --kernels torch takes it")


def aligned(size: int, dtype: torch.dtype) -> Tensor:
    """Zeroed memory that begins at a cache line."""
    memory = torch.zeros(size * dtype.itemsize + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + size * dtype.itemsize].view(dtype)

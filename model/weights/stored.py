"""A tensor as it stands in a file: plain numbers, or blocks that an op set may take as they are."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint; its data may be a view of the mapped file."""

    shape: tuple[int, ...]
    """As in torch: the contiguous dimension last."""
    kind: str
    """F32, F16, BF16, or GGUF's name of a block format."""
    data: Tensor
    """Plain numbers of that shape, or the blocks' bytes, row after row."""
    decode: Callable[[], Tensor]

    @classmethod
    def plain(cls, tensor: Tensor) -> "StoredTensor":
        """A tensor that needs no decoding."""
        kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[
            str(tensor.dtype).removeprefix("torch.")
        ]
        return cls(tuple(tensor.shape), kind, tensor, lambda: tensor)

    def dequantise(self) -> Tensor:
        """As stored if plain, else decoded to float32; raises ModelError for a format that has no decoder."""
        return self.decode()

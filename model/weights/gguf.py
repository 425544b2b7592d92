"""A GGUF model as a Checkpoint: its tensors in blocks as they stand there, or as plain numbers."""

import math
import weakref
from pathlib import Path

import torch
from gguf.constants import GGMLQuantizationType

from model.dialects.gguf import from_gguf
from model.dialects.gguf_names import EMBEDDING, gguf_names
from model.dialects.gguf_rope import FACTORS, LONG_FACTORS, SHORT_FACTORS
from model.errors import ModelError
from model.weights.checkpoint import Checkpoint
from model.weights.gguf_blocks import INTEGERS, decode_rows
from model.weights.gguf_parts import read_parts
from model.weights.stored import StoredTensor

_MOST_ROPE_FACTORS = 1 << 12

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


class GgufFiles:
    """A .gguf file, or all parts of a model of which one is given, as TensorFiles (see checkpoint.py)."""

    def __init__(self, path: Path) -> None:
        """Read and check the headers; raises ModelError for whatever is corrupt or not served."""
        self.path = path
        parts = read_parts(path)
        for part in parts:
            weakref.finalize(self, part.file.close)
        self.metadata = parts[0].metadata
        self._places = {name: (part, entry) for part in parts for name, entry in part.tensors.items()}
        self.shapes = {name: entry.shape for name, (_, entry) in self._places.items()}

    def file_of(self, name: str) -> Path:
        """The file that has the tensor, or the one that was given (TensorFiles.file_of)."""
        return self._places[name][0].path if name in self._places else self.path

    def dtype_of(self, name: str) -> torch.dtype:
        """Of plain numbers; blocks, and what is missing, count as float16."""
        kind = self._places[name][1].kind if name in self._places else GGMLQuantizationType.F16
        return _PLAIN.get(kind, torch.float16)

    def read(self, name: str) -> StoredTensor:
        """One tensor as it stands there (TensorFiles.read)."""
        part, entry = self._places[name]
        data = part.read(entry)
        if entry.kind in _PLAIN:
            return StoredTensor.plain(data.view(_PLAIN[entry.kind]).view(entry.shape))

        def decode(rows: torch.Tensor, width: int) -> torch.Tensor:
            try:
                return decode_rows(entry.kind, rows, width)
            except NotImplementedError as error:
                kind = f"tensor {name} is of type {entry.kind.name}"
                raise ModelError(
                    f"{part.path}: {kind}, which gguf cannot dequantise; use another file"
                ) from error

        rows = math.prod(entry.shape[:-1])
        integers = INTEGERS.get(entry.kind)
        return StoredTensor(entry.shape, entry.kind.name, data.view(rows, -1), decode, integers)


def open_gguf(path: Path) -> Checkpoint:
    """A .gguf file as a Checkpoint; raises ModelError for whatever is corrupt or not served."""
    files = GgufFiles(path)
    factors: dict[str, tuple[float, ...]] = {}
    for name in (FACTORS, LONG_FACTORS, SHORT_FACTORS):
        if name in files.shapes:
            if math.prod(files.shapes[name]) > _MOST_ROPE_FACTORS:
                raise ModelError(f"{path}: tensor {name} is too large; download the file again")
            factors[name] = tuple(files.read(name).dequantise().flatten().tolist())
    config = from_gguf(
        files.metadata,
        str(path),
        tensors=files.shapes,
        factors=factors,
        dtype=str(files.dtype_of(EMBEDDING)).removeprefix("torch."),
    )
    return Checkpoint(config, files, gguf_names(config, files.shapes))

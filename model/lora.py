"""LoRA adapters of one model: read and checked before its weights are, attached once they are there.

An adapter's number is its place among all, from 1: Chunk.adapter.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from model.dialects.hf_names import hf_names
from model.errors import ModelError
from model.loader import parameter_shapes
from model.ops.base import LowRank
from model.transformer import Transformer
from model.weights.adapters import Adapter, read_adapter
from model.weights.checkpoint import Checkpoint
from model.weights.gguf import GgufFiles

_ADAPTED = re.compile(r"layers\.\d+\.(attention\.(query|key|value|output)|mlp\.(gate|up|down))")
"""Our parameters that adapters may change; experts are not among them."""


def read_adapters(folders: Mapping[str, Path], checkpoint: Checkpoint) -> tuple[Adapter, ...]:
    """Read adapters of a checkpoint's model, by name (ModelError)."""
    if not folders:
        return ()
    # Who trains does so on a transformers folder, whatever is served here.
    is_gguf = isinstance(checkpoint.files, GgufFiles)
    names = hf_names(checkpoint.config) if is_gguf else checkpoint.names
    shapes = {
        name: shape for name, shape in parameter_shapes(checkpoint.config).items() if _ADAPTED.fullmatch(name)
    }
    return tuple(read_adapter(name, folder, names, shapes) for name, folder in folders.items())


def attach(model: Transformer, adapters: Sequence[Adapter]) -> int:
    """Let adapters change a model, before its graph is made (ModelError for numbers that it cannot hold).

    Gives the bytes that they take.
    """
    taken = 0
    for prefix, linear in model.linears():
        pairs, first = [], 0
        for part, size in linear.outputs.items():
            for number, adapter in enumerate(adapters, 1):
                if (pair := adapter.pairs.get(f"{prefix}.{part}")) is not None:
                    pairs.append(LowRank(number, first, pair.a, pair.b))
            first += size
        if pairs:
            try:
                linear.adapters = model.ops.adapters(pairs)
            except ValueError as error:
                paths = " or ".join(str(adapter.path) for adapter in adapters)
                raise ModelError(f"{paths}: {prefix}: {error}") from None
            taken += linear.adapters.num_bytes
    return taken

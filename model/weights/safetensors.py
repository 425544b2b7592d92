"""A folder in transformers' layout: config.json and *.safetensors, whole or in shards, with an index or not.

Every header is checked when the folder is opened; tensors are mapped and read one by one. Pickles
(.bin, .pth, .pt) are never opened. Links are followed wherever they lead: the hub's cache is made of them.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.config import ModelConfig, from_hf
from model.errors import ModelError
from model.weights.checkpoint import NameTable, shown
from model.weights.stored import StoredTensor

# Far above any published file's; what JSON takes in memory is dozens of times its length.
_MOST_CONFIG_BYTES = 1 << 20
_MOST_INDEX_BYTES = 1 << 25
_DTYPES = ("F32", "F16", "BF16")
_ROWS_COMPARED_AT_ONCE = 4096
_EMBEDDING = "model.embed_tokens.weight"
_OUTPUT = "lm_head.weight"

_NAMES = NameTable(
    top={_EMBEDDING: "embedding", "model.norm.weight": "final_norm", _OUTPUT: "output"},
    layer=re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.([a-z_.]+)\.weight"),
    layer_name="model.layers.{}.{}.weight",
    in_layer={
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "post_attention_layernorm": "mlp_norm",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    },
    # A buffer that old versions of transformers saved; it follows from the config.
    passed_over=re.compile(r"model\.(layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq"),
)


class SafetensorsCheckpoint:
    """A transformers folder as a Checkpoint (see checkpoint.py)."""

    def __init__(self, folder: Path) -> None:
        """Read config and headers; raises ModelError for whatever is missing, corrupt or not served."""
        self.folder = folder
        self.config = read_config(folder)
        self._files = _tensor_files(folder)
        self._ours = _NAMES.all_ours(self._files, self.config.num_layers)
        if self.config.tie_embeddings and _OUTPUT in self._ours:
            # A tied weight may stand under either name or both: safetensors' own save_model keeps lm_head.
            if _EMBEDDING in self._ours:
                del self._ours[_OUTPUT]
            else:
                self._ours[_OUTPUT] = "embedding"

    def place(self, name: str) -> str:
        """Name file and tensor (Checkpoint.place); the folder, if it has several files."""
        files = set(self._files.values())
        return f"{files.pop() if len(files) == 1 else self.folder}: the tensor '{_NAMES.theirs(name)}'"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our names and shapes (Checkpoint.shapes)."""
        return {ours: tuple(file.get_slice(name).get_shape()) for ours, file, name in self._found()}

    def tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """Yield (our name, tensor as stored); the contract is Checkpoint.tensors."""
        if _OUTPUT in self._files and _OUTPUT not in self._ours:
            self._check_tied()
        for ours, file, name in self._found():
            yield ours, StoredTensor.plain(file.get_tensor(name))

    def _found(self) -> Iterator[tuple[str, Any, str]]:
        """Yield each tensor that is wanted: our name, the open file that has it, and its name there."""
        for path in dict.fromkeys(self._files.values()):
            with _opened(path) as file:
                for name in file.offset_keys():
                    if name in self._ours:
                        yield self._ours[name], file, name

    def _check_tied(self) -> None:
        """Refuse a tied model whose file holds another output weight: one of the two would be ignored."""
        with _opened(self._files[_EMBEDDING]) as one, _opened(self._files[_OUTPUT]) as other:
            embedding, output = one.get_slice(_EMBEDDING), other.get_slice(_OUTPUT)
            shape = embedding.get_shape()
            equal = shape == output.get_shape()
            for row in range(0, shape[0] if equal and shape else 0, _ROWS_COMPARED_AT_ONCE):
                rows = slice(row, row + _ROWS_COMPARED_AT_ONCE)
                equal = equal and torch.equal(embedding[rows], output[rows])
        if not equal:
            raise ModelError(
                f"{self._files[_OUTPUT]}: tensor {_OUTPUT} differs from {_EMBEDDING} though config.json ties"
                " them; set tie_word_embeddings to false in config.json to use both"
            )


def read_config(folder: Path) -> ModelConfig:
    """Read config.json and, if it is there, generation_config.json; raises ModelError."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder}: has no config.json; give a folder in transformers' layout, or the path of a .gguf"
        )
    generation = folder / "generation_config.json"
    return from_hf(_read_object(path), _read_object(generation) if generation.is_file() else None, str(path))


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor in the folder, all headers checked."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    promised: dict[str, Path] = {}
    if single.is_file():
        paths = [single]
    elif index.is_file():
        promised = _read_index(index)
        paths = sorted(set(promised.values()))
    else:
        paths = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not paths:
        pickled = any(path.suffix in (".bin", ".pth", ".pt") for path in folder.iterdir())
        raise ModelError(
            f"{folder}: has no *.safetensors"
            + ("; its pickled weights are never loaded, save them again as safetensors" if pickled else "")
        )
    files: dict[str, Path] = {}
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in files:
                    raise ModelError(
                        f"{path}: tensor {shown(name)} stands in {files[name].name} too; remove stray shards"
                    )
                _check_tensor(file, name, path)
                files[name] = path
    for name, path in promised.items():
        if files.get(name) != path:
            raise ModelError(
                f"{index}: promises tensor {shown(name)} in {path.name}, which does not hold it;"
                " download the checkpoint again"
            )
    return files


def _read_index(index: Path) -> dict[str, Path]:
    """Return tensor name to shard path; the shards exist and lie in the index's folder."""
    weight_map = _read_object(index, _MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(
            f"{index}: field weight_map must map tensor names to files; download the index again"
        )
    shards: dict[str, Path] = {}
    for name, file in weight_map.items():
        # A plain name: an index must not lead out of its folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ModelError(f"{index}: {ascii(file)[:100]} is no name of a .safetensors file beside it")
        shards[name] = index.parent / file
    for path in sorted(set(shards.values())):
        if not path.is_file():
            raise ModelError(f"{index}: names {path.name}, which is missing; download the checkpoint again")
    return shards


def _check_tensor(file: Any, name: str, path: Path) -> None:
    dtype = file.get_slice(name).get_dtype()
    if dtype not in _DTYPES and not _NAMES.passed_over.fullmatch(name):
        raise ModelError(
            f"{path}: tensor {shown(name)} is of type {dtype}, only F32, F16 and BF16 are served;"
            " use the checkpoint before its quantisation, or a GGUF"
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open one file through the safetensors library, which checks the header against the file's size."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{path}: is not a whole safetensors file ({ascii(reason)[1:-1]}); download it again"
        ) from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error}); check the file and its rights") from error


def _read_object(path: Path, most_bytes: int = _MOST_CONFIG_BYTES) -> dict[str, object]:
    """Read a file that holds one JSON object; raises ModelError."""
    if path.stat().st_size > most_bytes:
        raise ModelError(f"{path}: is larger than any such JSON file; download it again")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        # ValueError: bad syntax, bad UTF-8, or an integer of thousands of digits.
        raise ModelError(f"{path}: is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object; download it again")
    return value

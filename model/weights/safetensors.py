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

from model.config import ModelConfig
from model.dialects.fields import Fields
from model.dialects.hf import from_hf
from model.dialects.hf_names import hf_names
from model.errors import ModelError
from model.weights.checkpoint import Checkpoint, shown
from model.weights.quantised import quantisation
from model.weights.quantised.pieces import QuantisedFiles
from model.weights.stored import StoredTensor

# Far above any published file's; what JSON takes in memory is dozens of times its length.
_MOST_CONFIG_BYTES = 1 << 20
_MOST_INDEX_BYTES = 1 << 25
_KINDS = ("F32", "F16", "BF16")


class SafetensorsFiles:
    """A folder's *.safetensors, or a single file, as TensorFiles (see checkpoint.py)."""

    def __init__(self, path: Path) -> None:
        """Read the headers; raises ModelError for whatever is missing, corrupt or not served."""
        self.path = path
        self._files = _tensor_files(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, str] = {}
        """Number types by tensor, in safetensors' words."""
        for path in dict.fromkeys(self._files.values()):
            with _opened(path) as file:
                for name in file.offset_keys():
                    header = file.get_slice(name)
                    self.shapes[name], self.kinds[name] = tuple(header.get_shape()), header.get_dtype()

    def file_of(self, name: str) -> Path:
        """The file that has the tensor, or the folder (TensorFiles.file_of)."""
        files = set(self._files.values())
        return self._files.get(name, files.pop() if len(files) == 1 else self.path)

    def read(self, name: str) -> StoredTensor:
        """One tensor as it stands there (TensorFiles.read); of a large matrix the rows that are asked for."""

        def rows(first: int, stop: int) -> torch.Tensor:
            # The library maps the file anew: the pages of these rows go with them.
            with _opened(self._files[name]) as file:
                found: torch.Tensor = file.get_slice(name)[first:stop]
                return found

        return StoredTensor.mapped(self.shapes[name], self.kinds[name], rows)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of any number type."""
        with _opened(self._files[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


def open_folder(folder: Path) -> Checkpoint:
    """A transformers folder as a Checkpoint; raises ModelError for what is missing, corrupt or not served."""
    config = read_config(folder)
    files = _tensors(folder)
    names = hf_names(config, files.shapes)
    for name, kind in files.kinds.items():
        if kind not in _KINDS and not names.is_passed_over(name):
            raise ModelError(
                f"{files.file_of(name)}: tensor {shown(name)} is of type {kind}, only F32, F16 and BF16 are"
                " served; use the checkpoint before its quantisation, or a GGUF"
            )
    return Checkpoint(config, files, names)


def _tensors(folder: Path) -> SafetensorsFiles | QuantisedFiles:
    """Give the folder's tensors, each quantised weight as one."""
    files, path = SafetensorsFiles(folder), folder / "config.json"
    settings = read_object(path).get("quantization_config")
    if settings is None:
        return files
    if not isinstance(settings, dict):
        raise Fields({"quantization_config": settings}, str(path)).refusal("quantization_config", "an object")
    return QuantisedFiles(files, quantisation(Fields(settings, f"{path} (quantization_config)")))


def read_config(folder: Path) -> ModelConfig:
    """Read config.json and, if it is there, generation_config.json; raises ModelError."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder}: has no config.json; give a folder in transformers' layout, or the path of a .gguf"
        )
    generation = folder / "generation_config.json"
    return from_hf(read_object(path), read_object(generation) if generation.is_file() else None, str(path))


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor in the folder, or in the file, all headers checked."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    promised: dict[str, Path] = {}
    if folder.is_file():
        paths = [folder]
    elif single.is_file():
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
    weight_map = read_object(index, _MOST_INDEX_BYTES).get("weight_map")
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


def read_object(path: Path, most_bytes: int = _MOST_CONFIG_BYTES) -> dict[str, object]:
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

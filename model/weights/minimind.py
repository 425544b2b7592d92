"""MiniMind's checkpoints: a bare `.pth` with or without a config.json beside it, or a folder of its own type.

Its config.json names code, which nobody runs. Weights of a folder are safetensors, else pytorch_model.bin.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from model.dialects.fields import MOST_HEADS
from model.dialects.hf_names import hf_names
from model.dialects.minimind import FIELDS, from_minimind, todays_words
from model.dialects.minimind_generations import ROTATIONS
from model.errors import ModelError
from model.weights.checkpoint import Checkpoint, shown
from model.weights.pth import PthFiles
from model.weights.safetensors import SafetensorsFiles, read_config, read_object
from model.weights.stored import PLAIN

CONFIG_FIELDS = "--config-fields"
"""The flag that says what no file does."""

_MODEL_TYPE = "minimind"


def is_minimind(folder: Path) -> bool:
    """Whether a folder's config.json says that the model is MiniMind in its own form (ModelError)."""
    path = folder / "config.json"
    return path.is_file() and read_object(path).get("model_type") == _MODEL_TYPE


def open_minimind(folder: Path, fields: Mapping[str, object]) -> Checkpoint:
    """A folder for which `is_minimind` as a Checkpoint; `fields` win over its config.json's (ModelError)."""
    files: SafetensorsFiles | PthFiles
    pickled = folder / "pytorch_model.bin"
    files = (
        PthFiles(pickled) if pickled.is_file() and not _has_safetensors(folder) else SafetensorsFiles(folder)
    )
    return _checkpoint(files, folder / "config.json", fields)


def open_pth(path: Path, fields: Mapping[str, object]) -> Checkpoint:
    """A file of torch.save as a Checkpoint; `fields` win over a config.json's beside it (ModelError)."""
    files, config_path = PthFiles(path), path.parent / "config.json"
    if not config_path.is_file() or read_object(config_path).get("model_type", _MODEL_TYPE) == _MODEL_TYPE:
        return _checkpoint(files, config_path, fields)
    refuse_fields(path, fields)
    config = read_config(path.parent)
    names = hf_names(config, files.shapes)
    return _of_plain_numbers(Checkpoint(config, files, names), files.kinds)


def refuse_fields(path: Path, fields: Mapping[str, object]) -> None:
    """Refuse fields that were given for a model whose own files say them all (ModelError)."""
    if fields:
        raise ModelError(
            f"{path}: {CONFIG_FIELDS} is for MiniMind's checkpoints, and this is none; leave it out"
        )


def _checkpoint(
    files: SafetensorsFiles | PthFiles, config_path: Path, fields: Mapping[str, object]
) -> Checkpoint:
    unknown = min(fields.keys() - set(FIELDS), default=None)
    if unknown is not None:
        raise ModelError(
            f"{CONFIG_FIELDS}: {shown(unknown)} is no field of MiniMind's, whose fields are"
            f" {', '.join(sorted(FIELDS))}"
        )
    config = read_object(config_path) if config_path.is_file() else {}
    said_by = [str(config_path)] * bool(config) + [CONFIG_FIELDS] * bool(fields)
    kinds = {files.kinds.get(name) for name in ("model.embed_tokens.weight", "tok_embeddings.weight")}
    dtype = next((dtype for dtype, kind in PLAIN.items() if kind in kinds), torch.float32)
    read, names = from_minimind(
        files.shapes,
        {**todays_words(config, str(config_path)), **todays_words(fields, CONFIG_FIELDS)},
        (str(files.path), " and ".join(said_by)),
        dtype=str(dtype).removeprefix("torch."),
        cosines=_cosines(files) if isinstance(files, PthFiles) else (),
    )
    return _of_plain_numbers(Checkpoint(read, files, names), files.kinds)


def _cosines(files: PthFiles) -> tuple[float, ...]:
    """Of each frequency's rotation by one position, from the table of a training that kept it."""
    for table, numbers in ROTATIONS.items():
        shape = files.shapes.get(table, ())
        if len(shape) == 2 and shape[0] > 1 and 0 < shape[1] <= MOST_HEADS:
            row = files.rows(table, 1, 2)[0, : shape[1] * numbers // 2]
            return tuple(torch.view_as_real(row)[:, 0].tolist() if row.is_complex() else row.float().tolist())
    return ()


def _of_plain_numbers(checkpoint: Checkpoint, kinds: Mapping[str, str]) -> Checkpoint:
    for name, kind in kinds.items():
        if kind not in PLAIN.values() and not checkpoint.names.is_passed_over(name):
            raise ModelError(
                f"{checkpoint.files.file_of(name)}: tensor {shown(name)} is of type {kind}, only float32,"
                " float16 and bfloat16 are served; save it as one of them"
            )
    return checkpoint


def _has_safetensors(folder: Path) -> bool:
    return next(folder.glob("*.safetensors"), None) is not None

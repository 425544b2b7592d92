"""Weight files of any format as one stream of (our name, tensor); checkpoint.py says what that is."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from model.errors import ModelError
from model.weights.checkpoint import Checkpoint
from model.weights.gguf import open_gguf
from model.weights.gguf_parts import model_in
from model.weights.minimind import is_minimind, open_minimind, open_pth, refuse_fields
from model.weights.safetensors import open_folder


def open_checkpoint(path: Path, fields: Mapping[str, object] = MappingProxyType({})) -> Checkpoint:
    """Open a .gguf or .pth file, or a folder with config.json and safetensors or with one GGUF model.

    `fields` are what a MiniMind checkpoint leaves unsaid (see dialects/minimind.py).
    Every header is checked: ModelError, which names the file, for what is missing, corrupt or not served.
    """
    try:
        if path.is_file() and path.suffix.lower() == ".pth":
            return open_pth(path, fields)
        if path.is_dir() and is_minimind(path):
            return open_minimind(path, fields)
        refuse_fields(path, fields)
        if path.is_dir():
            model = model_in(path)
            return open_folder(path) if model is None else open_gguf(model)
        if path.is_file() and path.suffix.lower() == ".gguf":
            return open_gguf(path)
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}); check the file and its rights"
        ) from error
    if path.exists():
        raise ModelError(
            f"{path}: is neither a .gguf or .pth file nor a folder with config.json and safetensors"
        )
    raise ModelError(f"{path}: does not exist")

"""Weight files of any format as one stream of (our name, tensor); checkpoint.py says what that is."""

from pathlib import Path

from model.errors import ModelError
from model.weights.checkpoint import Checkpoint
from model.weights.gguf import GgufCheckpoint
from model.weights.safetensors import SafetensorsCheckpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a .gguf file or a folder with config.json and safetensors, and check every header in it.

    Raises ModelError, which names the file, for anything that is missing, corrupt or not served.
    """
    try:
        if path.is_dir():
            return SafetensorsCheckpoint(path)
        if path.is_file() and path.suffix.lower() == ".gguf":
            return GgufCheckpoint(path)
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}); check the file and its rights"
        ) from error
    if path.exists():
        raise ModelError(f"{path}: is neither a .gguf file nor a folder with config.json and safetensors")
    raise ModelError(f"{path}: does not exist")

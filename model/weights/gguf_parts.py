"""The files of a GGUF model: one, or the parts that llama-gguf-split made of it.

A part's name ends in `-00002-of-00003.gguf`, and its metadata say the same: `split.no` (from zero),
`split.count`, `split.tensors.count` (of all parts). Only the first has the model's metadata.
"""

import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from model.dialects.fields import Fields
from model.errors import ModelError
from model.weights.checkpoint import shown
from model.weights.gguf_header import Header, TensorEntry

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_PARTS = 99999
_TENSORS = "split.tensors.count"


@dataclass(frozen=True, slots=True)
class Part:
    """One open file, its header read and checked."""

    path: Path
    file: BinaryIO
    metadata: dict[str, object]
    tensors: dict[str, TensorEntry]

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """The bytes of a tensor, in a mapping of its own: its pages go with it, and not with the file."""
        start = entry.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        before = entry.start - start
        data = _mapped(self.path, self.file, before + entry.size, start)
        return torch.frombuffer(data, dtype=torch.uint8, count=entry.size, offset=before)


def read_parts(path: Path) -> list[Part]:
    """The model's parts in order, whichever of them is given; ModelError if one is missing or another's."""
    given = read_part(path)
    count = _count(given)
    if count == 1:
        return [given]
    name = _NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise ModelError(
            f"{path}: is one of {count} parts by its metadata (split.count), but its name does not end in"
            f" -00001-of-{count:05}.gguf or the like; give all parts the names that they had"
        )
    parts: list[Part] = []
    files: dict[str, Path] = {}
    for number in range(count):
        file = path.with_name(f"{name['stem']}-{number + 1:05}-of-{count:05}.gguf")
        if not file.is_file():
            raise ModelError(f"{file}: is missing, one of {count} parts of a model; download it too")
        part = given if file == path else read_part(file)
        parts.append(part)
        _check_part(part, number, parts[0])
        for tensor in part.tensors:
            if tensor in files:
                raise ModelError(
                    f"{file}: tensor {shown(tensor)} stands in {files[tensor].name} too; the two are of"
                    " different models, download both again"
                )
            files[tensor] = file
    total = parts[0].metadata.get(_TENSORS, len(files))
    if total != len(files):
        raise Fields(parts[0].metadata, str(parts[0].path)).refusal(
            _TENSORS, f"{len(files)}, what the {count} parts have together; download all of them again"
        )
    return parts


def _count(part: Part) -> int:
    fields = Fields(part.metadata, str(part.path))
    return 1 if fields.get("split.count") == 0 else fields.count("split.count", _MOST_PARTS, 1)


def _check_part(part: Part, number: int, first: Part) -> None:
    """Hold what a part's metadata say against its place and against the first part."""
    fields = Fields(part.metadata, str(part.path))
    wanted = {"split.no": number, "split.count": _count(first), _TENSORS: first.metadata.get(_TENSORS)}
    for key, value in wanted.items():
        if fields.get(key) != value:
            raise fields.refusal(key, f"{value}; the file is of another model or renamed, download it again")


def model_in(folder: Path) -> Path | None:
    """The GGUF file of a folder that has no config.json, of several parts the first; None if it has none.

    Raises ModelError for several models.
    """
    if (folder / "config.json").is_file():
        return None
    models = []
    for path in sorted(folder.glob("*.gguf")):
        part = _NAME.fullmatch(path.name)
        if path.is_file() and (part is None or part["number"] == "00001"):
            models.append(path)
    if len(models) > 1:
        names = ", ".join(path.name for path in models[:4])
        raise ModelError(f"{folder}: holds {len(models)} GGUF models ({names}); give the path of one")
    return models[0] if models else None


def read_part(path: Path) -> Part:
    """One file, whatever its metadata say of others."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error}); check the file and its rights") from error
    with _mapped(path, file) as data:
        return Part(path, file, *Header(path, data).read())


def _mapped(path: Path, file: BinaryIO, size: int = 0, start: int = 0) -> mmap.mmap:
    """Map a file or a part; who cuts it short from then on ends us by SIGBUS: replace it, never rewrite."""
    try:
        # A private copy on write, since torch wants buffers that can be written.
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=start)
    except (OSError, ValueError) as error:
        # ValueError: the file is empty.
        raise ModelError(f"{path}: cannot be read ({error}); check the file and its rights") from error

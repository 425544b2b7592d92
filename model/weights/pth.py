"""A file of torch.save as TensorFiles: a dict of tensors, such as `model.state_dict()`.

The file is a zip archive of a pickle and of the tensors' bytes. The pickle may name nothing but what makes
tensors, is read by torch's `weights_only` unpickler and gives places in the file alone; each tensor is mapped
when it is read. What the archive, the pickle and the tensors claim is held against the file first.
"""

import mmap
import pickletools
import re
import struct
import sys
import zipfile
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from model.errors import ModelError
from model.weights.checkpoint import shown
from model.weights.stored import PLAIN, StoredTensor

# Far above any published file's: a tensor takes some 130 bytes of the pickle and 100 of the directory.
_MOST_PICKLE_BYTES = 1 << 20
_MOST_DIRECTORY_BYTES = 1 << 22

_END, _LOCATOR, _END64 = struct.Struct("<4s8xII2x"), struct.Struct("<4s4xQ4x"), struct.Struct("<4s36xQQ")
"""The end of a zip archive without a comment (APPNOTE.TXT 4.3.14 to 4.3.16): signature, size and offset of
the directory; the locator has the offset of the 64-bit end."""

_MAKES_TENSORS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"
)
"""`module name` of what the pickle may name."""

_NESTED = ("model", "state_dict")
"""Where checkpoints with an optimizer beside the model have its tensors."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Where one tensor stands in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    size: int
    """In bytes, as is `start`."""


class PthFiles:
    """A `.pth`, or a `pytorch_model.bin`, as TensorFiles (see checkpoint.py)."""

    def __init__(self, path: Path) -> None:
        """Check all but the tensors' numbers; raises ModelError for what is corrupt or not served."""
        self.path = path
        try:
            with path.open("rb") as file:
                archive = _Archive(path, file)
                tensors = _state_dict(path, archive.load())
                self._spans = {name: archive.span(name, tensor) for name, tensor in tensors.items()}
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error}); check the file and its rights") from error
        self.shapes = {name: span.shape for name, span in self._spans.items()}
        self.kinds = {
            name: PLAIN.get(span.dtype, str(span.dtype).removeprefix("torch."))
            for name, span in self._spans.items()
        }
        """Number types by tensor: F32, F16, BF16, or torch's word for another."""

    def file_of(self, name: str) -> Path:
        """The file (TensorFiles.file_of)."""
        return self.path

    def read(self, name: str) -> StoredTensor:
        """One tensor as it stands there (TensorFiles.read); of a large matrix the rows that are asked for."""
        span = self._spans[name]
        return StoredTensor.mapped(
            span.shape, PLAIN[span.dtype], lambda first, stop: self.rows(name, first, stop)
        )

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """Some rows of a tensor of whatever number type, mapped (ModelError if the file has changed)."""
        span = self._spans[name]
        row = span.size // span.shape[0] if span.shape else span.size
        start, end = span.start + first * row, span.start + stop * row
        begin = start - start % mmap.ALLOCATIONGRANULARITY
        try:
            with self.path.open("rb") as file:
                # A mapping of its own, so that its pages are given back with the tensor; private when written
                # to, since torch wants buffers that can be.
                data = mmap.mmap(file.fileno(), end - begin, access=mmap.ACCESS_COPY, offset=begin)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{self.path}: tensor {shown(name)} cannot be read ({error}); is the file being written?"
            ) from error
        numbers = torch.frombuffer(
            data, dtype=span.dtype, count=(end - start) // span.dtype.itemsize, offset=start - begin
        )
        return numbers.view(stop - first, *span.shape[1:]) if span.shape else numbers.view(())


class _Archive:
    """The zip archive that torch.save writes: its records, uncompressed, one for each storage."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._end = _start_of_directory(path, file)
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise self._refusal(f"is not a whole archive ({_line(error)})") from error
        records = sorted(self._zip.infolist(), key=lambda record: record.header_offset)
        self._records = records
        self._offsets = [record.header_offset for record in records]
        names = {record.filename.casefold() for record in records}
        if len(names) < len(records):
            raise self._refusal("holds two records of one name")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise self._refusal("is compressed, which torch.save never does")

    def load(self) -> object:
        """What was saved, its tensors on torch's meta device; nothing of theirs is read."""
        if self._small("byteorder", 6) not in (None, sys.byteorder.encode()):
            raise self._refusal("was written on a machine of another byte order")
        pickled = self._small("data.pkl", _MOST_PICKLE_BYTES)
        if pickled is None:
            raise self._refusal("has no data.pkl, so it is no file of torch.save")
        try:
            named = [str(value) for code, value, _ in pickletools.genops(pickled) if code.name == "GLOBAL"]
            foreign = next((name for name in named if not _MAKES_TENSORS.fullmatch(name)), None)
            if foreign is None:
                return torch.load(self._path, map_location="meta", weights_only=True)
        except Exception as error:
            # torch raises a dozen kinds, by what is wrong where.
            raise self._refusal(f"holds a broken pickle ({_line(error)})") from error
        code = shown(foreign.replace(" ", "."))[1:-1]
        raise ModelError(
            f"{self._path}: names {code}, and code of a file is never run; save `model.state_dict()` alone"
        )

    def span(self, name: str, tensor: Tensor) -> _Span:
        """Where a tensor's numbers stand, which must be a record of its own storage."""
        if tensor.layout != torch.strided or tensor.is_quantized or not tensor.is_contiguous():
            raise ModelError(
                f"{self._path}: tensor {shown(name)} is sparse, quantised or not contiguous;"
                " save a plain tensor, as `.contiguous()` gives"
            )
        storage = tensor.untyped_storage()
        start: int | None = getattr(storage, "_checkpoint_offset", None)
        size = int(tensor.numel() * tensor.element_size())
        before = tensor.storage_offset() * tensor.element_size()
        if start is None or not self._has_record(start, storage.nbytes()) or before + size > storage.nbytes():
            raise self._refusal(f"does not hold the numbers of tensor {shown(name)}")
        return _Span(tuple(tensor.shape), tensor.dtype, start + int(before), size)

    def _has_record(self, start: int, size: int) -> bool:
        index = bisect(self._offsets, start) - 1
        if index < 0 or self._records[index].file_size != size:
            return False
        return start + size <= [*self._offsets, self._end][index + 1]

    def _small(self, name: str, most_bytes: int) -> bytes | None:
        """A record that is read whole; torch looks for it beside the archive's first one."""
        folder = self._zip.infolist()[0].filename.partition("/")[0] if self._records else ""
        try:
            record = self._zip.getinfo(f"{folder}/{name}")
            if record.file_size > most_bytes:
                raise self._refusal(f"has a {name} larger than that of any model")
            return self._zip.read(record)
        except KeyError:
            return None
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise self._refusal(f"is damaged ({_line(error)})") from error

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(f"{self._path}: {reason}; save it again with torch.save, or fetch it again")


def _start_of_directory(path: Path, file: BinaryIO) -> int:
    """Where the archive's directory begins, if it is of a size that may be read whole (ModelError)."""
    file.seek(0, 2)
    end = file.tell() - _END.size
    place = end - _LOCATOR.size - 56
    file.seek(max(place, 0))
    tail = file.read()
    if end >= 0 and tail[-_END.size :].startswith(b"PK\5\6"):
        size: int
        start: int
        _, size, start = _END.unpack(tail[-_END.size :])
        if place >= 0 and tail[56:].startswith(b"PK\6\7"):  # of more than 4 GiB
            signature, size, start = _END64.unpack(tail[:56])
            if signature != b"PK\6\6" or _LOCATOR.unpack_from(tail, 56)[1] != place:
                size = -1
        if 0 <= size <= _MOST_DIRECTORY_BYTES and start + size <= end:
            return start
    raise ModelError(
        f"{path}: is no whole file of torch.save of 2020 or later (no zip archive of a bearable size);"
        " load it with torch and save it again, or fetch it again"
    )


def _state_dict(path: Path, saved: object) -> Mapping[str, Tensor]:
    """The dict of tensors that was saved, alone or beside a training's state."""
    inner = [saved[name] for name in _NESTED if name in saved] if isinstance(saved, dict) else []
    found = inner[0] if len(inner) == 1 and isinstance(inner[0], dict) else saved
    if not isinstance(found, dict):
        raise ModelError(
            f"{path}: holds a {type(found).__name__} and no dict of tensors; save `model.state_dict()`"
        )
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ModelError(
                f"{path}: holds {shown(str(name))}, which is no tensor by its name;"
                f" save `model.state_dict()`, alone or as {' or '.join(_NESTED)} of a dict"
            )
    return found


def _line(error: Exception) -> str:
    """The beginning of a library's words, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return ascii(text[:160])[1:-1]

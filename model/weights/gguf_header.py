"""The header of a GGUF file: metadata as plain values, and where each tensor lies.

Counts, lengths and offsets are held against the file's real size before anything is allocated by them.
Layout: ggml's docs/gguf.md, versions 2 and 3, little endian. The `gguf` package's own reader takes five
seconds for a vocabulary of 49152 tokens and believes every number.
"""

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from model.errors import ModelError
from model.weights.checkpoint import shown

# Far above any published model's, so that a lie costs at most some megabytes before it is found out.
_MOST_HEADER_BYTES = 1 << 26
_MOST_ENTRIES = 1 << 17
_MOST_ITEMS = 1 << 23
_MOST_STRING_BYTES = 1 << 24
_MOST_DIMENSIONS = 4

# Value types of the metadata by number, as struct codes; a bool is read as its byte.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies in the file, checked."""

    shape: tuple[int, ...]
    """As in torch: the contiguous dimension last, whole blocks of it."""
    kind: GGMLQuantizationType
    start: int
    """In bytes from the start of the file, as the size is."""
    size: int


class Header:
    """Reads a mapped file's header from front to back, each read checked against the file's end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self._data = data
        self._end = min(len(data), _MOST_HEADER_BYTES)
        self._position = 0
        self._part = "the header"  # what is being read, for messages

    def error(self, what: str) -> ModelError:
        """What to raise for something that is wrong in the part being read."""
        return ModelError(f"{self.path}: {what} in {self._part}; the file is corrupt, download it again")

    def read(self) -> tuple[dict[str, object], dict[str, TensorEntry]]:
        """Return metadata and tensors by name, both in the file's order; raises ModelError."""
        if self._data[self._take(4) : 4] != b"GGUF":
            raise self.error("no GGUF signature")
        version = self._number("I")
        if version not in (2, 3):
            # A big-endian file shows its version with the bytes reversed.
            raise self.error(f"version {version} (only 2 and 3, little endian, are read)")
        num_tensors = self._count("tensors", _MOST_ENTRIES, least_bytes=24)
        num_fields = self._count("fields", _MOST_ENTRIES, least_bytes=13)
        metadata: dict[str, object] = {}
        for _ in range(num_fields):
            self._part = "the metadata"
            key = self._string()
            self._part = f"metadata field {shown(key)}"
            if key in metadata:
                raise self.error("a second value")
            metadata[key] = self._value()
        return metadata, self._tensors(num_tensors, metadata)

    def _take(self, size: int) -> int:
        """Move on by `size` bytes, which the file must have, and return the position before."""
        before = self._position
        if size > self._end - before:
            raise self.error("end of the file" if self._end == len(self._data) else "the end of what is read")
        self._position = before + size
        return before

    def _number(self, code: str) -> int:
        return int(struct.unpack_from("<" + code, self._data, self._take(struct.calcsize("<" + code)))[0])

    def _count(self, what: str, most: int, least_bytes: int) -> int:
        """Read a number of things, of at least so many bytes each, for which the file must have room."""
        count = self._number("Q")
        if count > most or count * least_bytes > self._end - self._position:
            raise self.error(f"{count} {what}, more than the file can hold")
        return count

    def _string(self) -> str:
        size = self._number("Q")
        if size > _MOST_STRING_BYTES:
            raise self.error(f"a string of {size} bytes")
        start = self._take(size)
        try:
            return self._data[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise self.error("text that is not UTF-8") from error

    def _value(self) -> object:
        kind = self._number("I")
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(kind, 1)[0]
        kind, count = self._number("I"), self._count("items", _MOST_ITEMS, least_bytes=1)
        if kind == _STRING:
            return self._strings(count)
        return self._numbers(kind, count)

    def _strings(self, count: int) -> list[str]:
        """Many strings: a vocabulary is most of a header, so this is `_string` without its steps."""
        data, position, end = self._data, self._position, self._end
        size_at = struct.Struct("<Q").unpack_from
        texts: list[str] = []
        for _ in range(count):
            start = position + 8
            stop = start + size_at(data, position)[0] if start <= end else end + 1
            if stop > end or stop - start > _MOST_STRING_BYTES:
                break
            try:
                texts.append(data[start:stop].decode())
            except UnicodeDecodeError:
                break
            position = stop
        self._position = position
        if len(texts) < count:
            self._string()  # says what is wrong with it
        return texts

    def _numbers(self, kind: int, count: int) -> list[object]:
        if kind not in _NUMBERS:
            raise self.error(f"value type {kind}, which is unknown or nested")
        code = f"<{count}{_NUMBERS[kind]}"
        values = struct.unpack_from(code, self._data, self._take(struct.calcsize(code)))
        return [bool(value) for value in values] if kind == _BOOL else list(values)

    def _tensors(self, count: int, metadata: dict[str, object]) -> dict[str, TensorEntry]:
        self._part = "metadata field 'general.alignment'"
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self.error("no power of two from 8 to 65536")
        tensors: dict[str, TensorEntry] = {}
        end = 0
        for _ in range(count):
            self._part = "the tensor table"
            name = self._string()
            self._part = f"the table entry of tensor {shown(name)}"
            if name in tensors:
                raise self.error("a second entry")
            if not 1 <= (dimensions := self._number("I")) <= _MOST_DIMENSIONS:
                raise self.error(f"{dimensions} dimensions")
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            kind, offset = self._number("I"), self._number("Q")
            if kind not in GGML_QUANT_SIZES:
                raise self.error(f"tensor type {kind}, which is unknown to this version of gguf")
            block_values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if 0 in shape or shape[-1] % block_values:
                raise self.error(f"shape {shape} that is not made of blocks of {block_values}")
            # As llama.cpp reads it: the tensors lie in the table's order and without gaps but for alignment.
            start = -(-end // alignment) * alignment
            if offset != start:
                raise self.error(f"offset {offset} in place of {start}")
            size = math.prod(shape) // block_values * block_bytes
            end = start + size
            tensors[name] = TensorEntry(shape, GGMLQuantizationType(kind), start, size)
        data_start = -(-self._position // alignment) * alignment
        for name, tensor in tensors.items():
            if data_start + tensor.start + tensor.size > len(self._data):
                short = data_start + end - len(self._data)
                raise ModelError(
                    f"{self.path}: ends within tensor {shown(name)}, {short} bytes short of what its table"
                    " says; the file is truncated, download it again"
                )
        return {name: replace(tensor, start=data_start + tensor.start) for name, tensor in tensors.items()}

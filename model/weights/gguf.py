"""A GGUF file: metadata as plain values, and its tensors in our names, order of rows and floating point.

Counts, lengths and offsets are held against the file's real size before anything is allocated by them.
Layout: ggml's docs/gguf.md, versions 2 and 3, little endian. The `gguf` package's own reader takes five
seconds for a vocabulary of 49152 tokens and believes every number, so only its dequantisers are used.
"""

import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from model.config import ModelConfig, from_gguf
from model.errors import ModelError
from model.weights.checkpoint import NameTable, shown
from model.weights.stored import StoredTensor

# Far above any published model's, so that a lie costs at most some megabytes before it is found out.
_MOST_HEADER_BYTES = 1 << 26
_MOST_ENTRIES = 1 << 17
_MOST_ITEMS = 1 << 23
_MOST_STRING_BYTES = 1 << 24
_MOST_DIMENSIONS = 4
_MOST_ROPE_FACTORS = 1 << 12

# Value types of the metadata by number, as struct codes; a bool is read as its byte.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9

_VALUES_AT_ONCE = 1 << 15
"""Values dequantised at once: they stay in the cache, and are too few for torch to wake other threads."""

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

_ROPE_FACTORS = "rope_freqs.weight"
_NAMES = NameTable(
    top={"token_embd.weight": "embedding", "output_norm.weight": "final_norm", "output.weight": "output"},
    layer=re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z_]+)\.weight"),
    layer_name="blk.{}.{}.weight",
    in_layer={
        "attn_norm": "attention_norm",
        "attn_q": "attention.query",
        "attn_k": "attention.key",
        "attn_v": "attention.value",
        "attn_output": "attention.output",
        "ffn_norm": "mlp_norm",
        "ffn_gate": "mlp.gate",
        "ffn_up": "mlp.up",
        "ffn_down": "mlp.down",
    },
    # The factors go into the config; attn_rot_embd is the frequencies themselves, which follow from it.
    passed_over=re.compile(r"rope_freqs\.weight|blk\.[0-9]+\.attn_rot_embd\.weight"),
)


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor lies in the file, checked."""

    shape: tuple[int, ...]
    """As in torch: the contiguous dimension last, whole blocks of it."""
    kind: GGMLQuantizationType
    start: int
    """In bytes from the start of the file, as the size is."""
    size: int


class _Header:
    """Reads a mapped file's header from front to back, each read checked against the file's end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self._data = data
        self._end = min(len(data), _MOST_HEADER_BYTES)
        self._position = 0
        self._part = "the header"  # what is being read, for messages

    def error(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what} in {self._part}; the file is corrupt, download it again")

    def read(self) -> tuple[dict[str, object], dict[str, _Stored]]:
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

    def _tensors(self, count: int, metadata: dict[str, object]) -> dict[str, _Stored]:
        self._part = "metadata field 'general.alignment'"
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self.error("no power of two from 8 to 65536")
        tensors: dict[str, _Stored] = {}
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
            tensors[name] = _Stored(shape, GGMLQuantizationType(kind), start, size)
        data_start = -(-self._position // alignment) * alignment
        for name, tensor in tensors.items():
            if data_start + tensor.start + tensor.size > len(self._data):
                short = data_start + end - len(self._data)
                raise ModelError(
                    f"{self.path}: ends within tensor {shown(name)}, {short} bytes short of what its table"
                    " says; the file is truncated, download it again"
                )
        return {name: replace(tensor, start=data_start + tensor.start) for name, tensor in tensors.items()}


class GgufCheckpoint:
    """A .gguf file as a Checkpoint (see checkpoint.py)."""

    def __init__(self, path: Path) -> None:
        """Read and check the header; raises ModelError for whatever is corrupt or not served."""
        self.path = path
        self._data = _mapped(path)
        self.metadata, self._tensors = _Header(path, self._data).read()
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise ModelError(f"{path}: is one part of a split model; join it with llama-gguf-split --merge")
        embedding = self._tensors.get("token_embd.weight")
        dtype = _PLAIN.get(embedding.kind, torch.float16) if embedding else torch.float16
        rope_factors: tuple[float, ...] | None = None
        if _ROPE_FACTORS in self._tensors:
            if math.prod(self._tensors[_ROPE_FACTORS].shape) > _MOST_ROPE_FACTORS:
                raise ModelError(f"{path}: tensor {_ROPE_FACTORS} is too large; download the file again")
            rope_factors = tuple(self._read(_ROPE_FACTORS).dequantise().flatten().tolist())
        self.config: ModelConfig = from_gguf(
            self.metadata,
            str(path),
            tie_embeddings="output.weight" not in self._tensors,
            dtype=str(dtype).removeprefix("torch."),
            rope_factors=rope_factors,
        )
        self._ours = _NAMES.all_ours(dict.fromkeys(self._tensors, path), self.config.num_layers)

    def place(self, name: str) -> str:
        """Name file and tensor (Checkpoint.place)."""
        return f"{self.path}: the tensor '{_NAMES.theirs(name)}'"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our names and shapes (Checkpoint.shapes)."""
        return {ours: self._tensors[name].shape for name, ours in self._ours.items()}

    def tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """Yield (our name, tensor as stored); the contract is Checkpoint.tensors."""
        for name, ours in self._ours.items():
            yield ours, self._read(name)

    def _read(self, name: str) -> StoredTensor:
        stored = self._tensors[name]
        data = torch.frombuffer(self._data, dtype=torch.uint8, count=stored.size, offset=stored.start)
        if name.endswith((".attn_q.weight", ".attn_k.weight")):
            heads = self.config.num_heads if "attn_q" in name else self.config.num_kv_heads
            rows = heads * self.config.head_dim
            if math.prod(stored.shape[:-1]) != rows:
                raise ModelError(
                    f"{self.path}: tensor {name} is {stored.shape}, not of {rows} rows; download it again"
                )
            # llama.cpp rotates neighbours, so its converter interleaved the two halves of each head's rows.
            data = data.view(heads, self.config.head_dim // 2, 2, -1).transpose(1, 2).flatten()
        if stored.kind in _PLAIN:
            return StoredTensor.plain(data.view(_PLAIN[stored.kind]).view(stored.shape))

        def decode() -> torch.Tensor:
            try:
                return _dequantised(data, stored)
            except NotImplementedError as error:
                kind = f"tensor {name} is of type {stored.kind.name}"
                raise ModelError(
                    f"{self.path}: {kind}, which gguf cannot dequantise; use another file"
                ) from error

        return StoredTensor(stored.shape, stored.kind.name, data, decode)


def _mapped(path: Path) -> mmap.mmap:
    """Map a file; who cuts it short from then on ends us by SIGBUS: replace files, and never rewrite them."""
    try:
        with path.open("rb") as file:
            # A private copy on write, since torch wants buffers that can be written.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        # ValueError: the file is empty.
        raise ModelError(f"{path}: cannot be read ({error}); check the file and its rights") from error


def _dequantised(data: torch.Tensor, stored: _Stored) -> torch.Tensor:
    """Decode the bytes of a tensor to float32; NotImplementedError if gguf cannot."""
    values = torch.empty(stored.shape)
    block_values, block_bytes = GGML_QUANT_SIZES[stored.kind]
    blocks, out = data.view(-1, block_bytes), values.view(-1, block_values)
    step = _VALUES_AT_ONCE // block_values
    decode = _DECODERS.get(stored.kind)
    for start in range(0, len(blocks), step):
        some = blocks[start : start + step]
        if decode is not None:
            decode(some, out[start : start + step])
        else:
            decoded = torch.from_numpy(dequantize(some.flatten().numpy(), stored.kind))
            out[start : start + step] = decoded.view(-1, block_values)
    return values


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Return the float16 at a byte of each block as float32 [blocks, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _unpack_nibbles(packed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Spread [blocks, 16] bytes: the low halves are a block's first 16 values, the high ones the rest."""
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4
    return out


# The block formats of the commonest files, bit for bit as gguf.quants has them and four times as fast:
# [blocks, bytes of a block] into float32 [blocks, 32]. The layouts are ggml's, in ggml-common.h.
def _decode_q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _unpack_nibbles(blocks[:, 2:], out).sub_(8).mul_(_half(blocks, 0))


def _decode_q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _unpack_nibbles(blocks[:, 4:], out).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _decode_q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0))


_DECODERS: dict[GGMLQuantizationType, Callable[[torch.Tensor, torch.Tensor], None]] = {
    GGMLQuantizationType.Q4_0: _decode_q4_0,
    GGMLQuantizationType.Q4_1: _decode_q4_1,
    GGMLQuantizationType.Q8_0: _decode_q8_0,
}

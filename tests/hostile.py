"""What tests of hostile model files share: files made byte by byte, and a bound on memory and time."""

import gc
import json
import resource
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_large() -> Iterator[None]:
    """Let allocations of more than 256 MB in all fail, and the whole compute no longer than two seconds."""
    with open("/proc/self/statm") as statm:
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (256 << 20), hard))
    gc.disable()  # a walk through what other tests left would be taken for the file's computing
    start = time.process_time()
    try:
        yield
        assert time.process_time() - start < 2
    finally:
        gc.enable()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor_entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def string(text: str | bytes, size: int | None = None) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data) if size is None else size) + data


def field(name: str, kind: int, payload: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + payload


def entry(
    name: str, shape: list[int], kind: int = 0, offset: int = 0, dimensions: int | None = None
) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def raw_gguf(
    fields: list[bytes],
    tensors: list[bytes],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_fields: int | None = None,
    data: bytes = b"",
) -> bytes:
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(fields) if num_fields is None else num_fields,
    )
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(fields) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


TINY_METADATA = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 2,
    "llama.vocab_size": 4,
}
TINY_FIELDS = [
    field("general.architecture", 8, string("llama")),
    *(field(name, 4, struct.pack("<I", value)) for name, value in TINY_METADATA.items()),
    field("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
]

"""From a checkpoint on disk to a Runner: weights, cache size, graph.

Loading is strict: every parameter is set exactly once by a tensor of its shape, or it fails by name.
"""

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from model.config import ModelConfig
from model.errors import ModelError
from model.graph import make_graph
from model.kv_cache import KVCache, bytes_per_token
from model.machine import available_memory, usable_cores
from model.ops.base import Ops, Weight
from model.ops.reference import TorchOps
from model.runner import SCORED_ROWS, Runner
from model.transformer import Transformer
from model.weights.checkpoint import Checkpoint
from model.weights.stored import StoredTensor

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class CacheSize:
    """How large the KV cache is to be; with neither number it takes what fits."""

    tokens: int | None = None
    bytes: int | None = None


def load_model(
    checkpoint: Checkpoint,
    ops: Ops,
    max_model_len: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Transformer:
    """Allocate the model and fill it; `progress` gets weights done and in all."""
    check_shapes(checkpoint)
    check_positions(checkpoint.config, max_model_len, ops.device)
    model = Transformer(checkpoint.config, ops, max_model_len)
    unset = dict(model.parameters())
    total = sum(math.prod(ops.shape(weight)) for weight in unset.values())
    done = 0

    def fill(name: str, weight: Weight, stored: StoredTensor) -> int:
        try:
            ops.fill(weight, stored)
        except ValueError as error:
            raise ModelError(f"{checkpoint.place(name)}: {error}") from None
        return math.prod(stored.shape)

    # Decoding and repacking run without the GIL. Few tensors are under way at a time: memory is bounded.
    workers = usable_cores()
    with ThreadPoolExecutor(workers, "rivulet-load") as pool:
        under_way: deque[Future[int]] = deque()
        for name, stored in checkpoint.tensors():
            weight = unset.pop(name)
            assert ops.shape(weight) == stored.shape
            under_way.append(pool.submit(fill, name, weight, stored))
            while len(under_way) > workers or (under_way and under_way[0].done()):
                done += under_way.popleft().result()
                progress(done, total)
        for filled in under_way:
            done += filled.result()
            progress(done, total)
    assert not unset
    return model


def check_shapes(checkpoint: Checkpoint) -> None:
    """Hold the config against the tensors that are really there, before anything is allocated by it."""
    config = checkpoint.config
    meta = Transformer(replace(config, num_layers=1), TorchOps(torch.device("meta"), torch.float32), 1)
    missing: dict[str, tuple[int, ...]] = {}
    for name, weight in meta.parameters():
        layers = range(config.num_layers) if name.startswith("layers.0.") else (0,)
        missing |= dict.fromkeys(
            (name.replace("layers.0.", f"layers.{i}.") for i in layers), tuple(weight.shape)
        )
    for name, shape in checkpoint.shapes().items():
        if name not in missing:
            raise ModelError(f"{checkpoint.place(name)} has no place in a model of this config")
        if (expected := missing.pop(name)) != shape:
            raise ModelError(
                f"{checkpoint.place(name)} has shape {list(shape)}, but its config says {list(expected)}"
            )
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{checkpoint.place(next(iter(missing)))} is missing{more}; download the checkpoint again"
        )


def check_positions(config: ModelConfig, max_model_len: int, device: torch.device) -> None:
    """Refuse a context whose table of rotations alone would fill the memory; a file may claim any."""
    needed, free = 4 * config.head_dim * max_model_len, available_memory(device)
    if needed > free // 8:
        raise ModelError(
            f"a context of {max_model_len:,} tokens needs a rotary table of {needed / GIB:.2f} GiB, and "
            f"{free / GIB:.2f} GiB are free: set --max-model-len to what is needed"
        )


def size_cache(
    model: Transformer, wanted: CacheSize, max_model_len: int, max_running: int
) -> tuple[int, str]:
    """How many blocks the cache gets, and a line that says so with its numbers.

    Auto is as much as the running requests can be expected to use (1,024 tokens each, or two whole
    contexts), but never more than half of the free memory on a CPU, 90 % of it on a GPU.
    """
    ops = model.ops
    layout = ops.cache_layout(model.config.num_kv_heads, model.config.head_dim)
    size, per_token = layout.block_size, bytes_per_token(model.config, layout.dtype)
    per_block = per_token * size
    free = available_memory(ops.device)
    if wanted.tokens is not None:
        blocks, why = -(-wanted.tokens // size), "as asked"
    elif wanted.bytes is not None:
        blocks, why = wanted.bytes // per_block, "as asked"
    elif ops.device.type == "cuda":
        blocks, why = int(free * 0.9) // per_block, "90 % of the free GPU memory"
    else:
        useful = -(-max(2 * max_model_len, 1024 * max_running) // size)
        fits = free // 2 // per_block
        blocks = min(useful, fits)
        why = "half of the free memory" if fits < useful else "enough for the running requests"
    tokens, taken = blocks * size, blocks * per_block
    if tokens < 2 or taken > free:
        raise ModelError(
            f"a KV cache of {tokens:,} tokens needs {taken / GIB:.2f} GiB, and {free / GIB:.2f} GiB are "
            f"free: set --kv-cache-tokens or --kv-cache-memory to what fits"
        )
    line = (
        f"KV cache: {tokens:,} tokens in {blocks:,} blocks of {size}, {taken / GIB:.2f} GiB "
        f"({per_token / 1024:.1f} KiB a token) of {free / GIB:.1f} GiB free; {why}"
    )
    return blocks, line


def make_runner(model: Transformer, num_blocks: int, max_rows: int, max_sequences: int) -> Runner:
    """The model with its cache, ready for steps of so many rows and sequences."""
    layout = model.ops.cache_layout(model.config.num_kv_heads, model.config.head_dim)
    cache = KVCache(model.config, num_blocks, layout)
    return Runner(make_graph(model, cache, max_rows, max(max_sequences, SCORED_ROWS)))

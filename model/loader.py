"""From a checkpoint on disk to a Runner: weights, cache size, graph.

Loading is strict: every parameter is set exactly once by a tensor of its shape, or it fails by name.
"""

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import mul

import torch

from model.config import CacheGroup, ModelConfig, most_blocks
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
    checkpoint.check(parameter_shapes(checkpoint.config))
    check_positions(checkpoint.config, max_model_len, ops.device)
    model = Transformer(checkpoint.config, ops, max_model_len)
    unset = dict(model.parameters())
    shapes = {name: ops.shape(weight) for name, weight in unset.items()}
    total = sum(math.prod(shape) for shape in shapes.values())
    done = 0

    def fill(name: str, weight: Weight, stored: StoredTensor) -> int:
        try:
            ops.fill(weight, stored)
        except ValueError as error:
            raise ModelError(f"{checkpoint.describe(name)}: {error}") from None
        return math.prod(stored.shape)

    # Decoding and repacking run without the GIL. Few tensors are under way at a time: memory is bounded.
    workers = usable_cores()
    with ThreadPoolExecutor(workers, "rivulet-load") as pool:
        under_way: deque[Future[int]] = deque()
        for name, stored in checkpoint.tensors(shapes):
            weight = unset.pop(name)
            assert shapes[name] == stored.shape
            under_way.append(pool.submit(fill, name, weight, stored))
            while len(under_way) > workers or (under_way and under_way[0].done()):
                done += under_way.popleft().result()
                progress(done, total)
        for filled in under_way:
            done += filled.result()
            progress(done, total)
    assert not unset
    return model


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our name and the shape of every parameter, without allocating any."""
    ops = TorchOps(torch.device("meta"), torch.float32)
    return {name: ops.shape(weight) for name, weight in example_parameters(config, ops).items()}


def example_parameters(config: ModelConfig, ops: Ops) -> dict[str, Weight]:
    """Every parameter by our name, unset; a layer of each kind stands for all layers of its kind."""
    kinds = dict.fromkeys(config.layers)
    model = Transformer(replace(config, layers=tuple(kinds)), ops, 1)
    by_kind = dict(zip(kinds, model.layers, strict=True))
    parameters = {name: weight for name, weight in model.parameters() if not name.startswith("layers.")}
    for index, layer in enumerate(config.layers):
        parameters |= {f"layers.{index}.{name}": weight for name, weight in by_kind[layer].parameters()}
    return parameters


def check_positions(config: ModelConfig, max_model_len: int, device: torch.device) -> None:
    """Refuse a context whose table of rotations alone would fill the memory; a file may claim any."""
    needed, free = 4 * config.head_dim * max_model_len, available_memory(device)
    if needed > free // 8:
        raise ModelError(
            f"a context of {max_model_len:,} tokens needs a rotary table of {needed / GIB:.2f} GiB, and "
            f"{free / GIB:.2f} GiB are free: set --max-model-len to what is needed"
        )


def size_cache(
    model: Transformer, wanted: CacheSize, max_model_len: int, max_running: int, token_budget: int
) -> tuple[tuple[int, ...], str]:
    """How many blocks each cache group gets, and a line that says so with its numbers.

    The first group, which sees furthest, gets the tokens that were asked for; a further one as many, but no
    more than all running requests can hold of its window. Auto is as much as the running requests can be
    expected to use (1,024 tokens each, or two whole contexts), but never more than half of the free memory
    on a CPU, 90 % of it on a GPU.
    """
    config, ops = model.config, model.ops
    layout = ops.cache_layout(config.num_kv_heads, config.head_dim)
    size = layout.block_size
    per_block = [size * bytes_per_token(config, layout.dtype, group) for group in config.cache_groups]

    def most(group: CacheGroup, num_tokens: int) -> int:
        return most_blocks(group.window, num_tokens, token_budget, size)

    def divide(blocks: int) -> tuple[int, ...]:
        further = config.cache_groups[1:]
        return (blocks, *(min(blocks, max_running * most(group, max_model_len)) for group in further))

    def taken_by(blocks: int) -> int:
        return sum(map(mul, divide(blocks), per_block))

    def fitting(memory: int) -> int:
        return bisect_right(range(memory // per_block[0] + 1), memory, key=taken_by) - 1

    free = available_memory(ops.device)
    if wanted.tokens is not None:
        blocks, why = -(-wanted.tokens // size), "as asked"
    elif wanted.bytes is not None:
        blocks, why = fitting(wanted.bytes), "as asked"
    elif ops.device.type == "cuda":
        blocks, why = fitting(int(free * 0.9)), "90 % of the free GPU memory"
    else:
        first = config.cache_groups[0]
        useful = max(2 * most(first, max_model_len), max_running * most(first, 1024))
        fits = fitting(free // 2)
        blocks = min(useful, fits)
        why = "half of the free memory" if fits < useful else "enough for the running requests"
    tokens, taken = blocks * size, taken_by(blocks)
    if tokens < 2 or taken > free:
        raise ModelError(
            f"a KV cache of {tokens:,} tokens needs {taken / GIB:.2f} GiB, and {free / GIB:.2f} GiB are "
            f"free: set --kv-cache-tokens or --kv-cache-memory to what fits"
        )
    parts = []
    for group, count, each in zip(config.cache_groups, divide(blocks), per_block, strict=True):
        of = "" if group.window is None else f" for layers with a window of {group.window:,}"
        kib = each / size / 1024
        parts.append(f"{count * size:,} tokens in {count:,} blocks of {size}{of} ({kib:.1f} KiB a token)")
    line = f"KV cache: {', '.join(parts)}; {taken / GIB:.2f} GiB of {free / GIB:.1f} GiB free; {why}"
    return divide(blocks), line


def longest_sequence(
    model: Transformer, num_blocks: Sequence[int], max_model_len: int, token_budget: int
) -> int:
    """Tokens of the longest sequence that the cache holds when it is alone there, up to the model's."""
    layout = model.ops.cache_layout(model.config.num_kv_heads, model.config.head_dim)

    def fits(length: int) -> bool:
        groups = zip(model.config.cache_groups, num_blocks, strict=True)
        return all(
            most_blocks(group.window, length, token_budget, layout.block_size) <= blocks
            for group, blocks in groups
        )

    return bisect_left(range(1, max_model_len + 1), True, key=lambda length: not fits(length))


def make_runner(
    model: Transformer, num_blocks: Sequence[int], max_rows: int, max_sequences: int, max_guesses: int = 0
) -> Runner:
    """The model with so many blocks for each cache group, ready for steps of so many rows and sequences.

    `max_guesses` are the rows of guesses in a step, all sequences together.
    """
    layout = model.ops.cache_layout(model.config.num_kv_heads, model.config.head_dim)
    cache = KVCache(model.config, num_blocks, layout)
    return Runner(make_graph(model, cache, max_rows, max(max_sequences + max_guesses, SCORED_ROWS)))

"""From a checkpoint on disk to a Runner: device, weight type, weights, cache size.

Loading is strict: every parameter is set exactly once by a tensor of its shape, or it fails by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.errors import ModelError
from model.kv_cache import KVCache, bytes_per_token
from model.memory import available_memory
from model.ops import TorchOps
from model.runner import Runner
from model.transformer import Transformer
from model.weights.checkpoint import Checkpoint

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class CacheSize:
    """How large the KV cache is to be; with neither number it takes what fits."""

    tokens: int | None = None
    bytes: int | None = None


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> a device that is there (ModelError if not)."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda was asked for, but torch sees no CUDA GPU: use --device cpu or auto")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` takes bfloat16 where the processor multiplies it (measured twice as fast), else float32."""
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def use_threads(count: int) -> None:
    """How many threads torch's CPU ops take."""
    torch.set_num_threads(count)


def describe(ops: TorchOps) -> str:
    """What the model runs on, for the log and `/info`."""
    dtype = str(ops.dtype).removeprefix("torch.")
    if ops.device.type == "cuda":
        return f"{torch.cuda.get_device_name(ops.device)}, {dtype}, {ops.name} ops"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU ({capability}), {torch.get_num_threads()} threads, {dtype}, {ops.name} ops"


def load_model(
    checkpoint: Checkpoint,
    ops: TorchOps,
    max_model_len: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Transformer:
    """Allocate the model and fill it; `progress` gets weights done and in all."""
    model = Transformer(checkpoint.config, ops, max_model_len)
    unset = dict(model.parameters())
    total = sum(weight.numel() for weight in unset.values())
    done = 0
    for name, tensor in checkpoint.tensors():
        if name not in unset:
            raise ModelError(f"{checkpoint.place(name)} has no place in a model of this config")
        weight = unset.pop(name)
        if weight.shape != tensor.shape:
            raise ModelError(
                f"{checkpoint.place(name)} has shape {list(tensor.shape)}, "
                f"but its config says {list(weight.shape)}"
            )
        weight.copy_(tensor)
        done += weight.numel()
        progress(done, total)
    if unset:
        missing = f"{checkpoint.place(next(iter(unset)))} is missing"
        more = f", and {len(unset) - 1} more" if len(unset) > 1 else ""
        raise ModelError(f"{missing}{more}; download the checkpoint again")
    return model


def size_cache(
    model: Transformer, wanted: CacheSize, max_model_len: int, max_running: int
) -> tuple[int, str]:
    """How many blocks the cache gets, and a line that says so with its numbers.

    Auto is as much as the running requests can be expected to use (1,024 tokens each, or two whole
    contexts), but never more than half of the free memory on a CPU, 90 % of it on a GPU.
    """
    ops = model.ops
    per_token = bytes_per_token(model.config, ops.cache_dtype)
    per_block = per_token * ops.block_size
    free = available_memory(ops.device)
    if wanted.tokens is not None:
        blocks, why = -(-wanted.tokens // ops.block_size), "as asked"
    elif wanted.bytes is not None:
        blocks, why = wanted.bytes // per_block, "as asked"
    elif ops.device.type == "cuda":
        blocks, why = int(free * 0.9) // per_block, "90 % of the free GPU memory"
    else:
        useful = -(-max(2 * max_model_len, 1024 * max_running) // ops.block_size)
        fits = free // 2 // per_block
        blocks = min(useful, fits)
        why = "half of the free memory" if fits < useful else "enough for the running requests"
    tokens = blocks * ops.block_size
    size = blocks * per_block
    if tokens < 2 or size > free:
        raise ModelError(
            f"a KV cache of {tokens:,} tokens needs {size / GIB:.2f} GiB, and {free / GIB:.2f} GiB are free: "
            f"set --kv-cache-tokens or --kv-cache-memory to what fits"
        )
    line = (
        f"KV cache: {tokens:,} tokens in {blocks:,} blocks of {ops.block_size}, {size / GIB:.2f} GiB "
        f"({per_token / 1024:.1f} KiB a token) of {free / GIB:.1f} GiB free; {why}"
    )
    return blocks, line


def make_runner(model: Transformer, num_blocks: int) -> Runner:
    """The model with its cache."""
    ops = model.ops
    return Runner(model, KVCache(model.config, num_blocks, ops.block_size, ops.cache_dtype, ops.device))

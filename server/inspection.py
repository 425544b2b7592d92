"""`rivulet inspect`: what a model is, what it takes and how fast it should run here; nothing is loaded.

It reads the same headers and makes the same choices as `rivulet serve`, so what it lets pass can be served.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from model.backend import Backend, Wishes, choose_backend
from model.bandwidth import Bandwidth
from model.config import LayerConfig, ModelConfig
from model.errors import ModelError
from model.footprint import SHARE_OF_BANDWIDTH, Footprint, cache_bytes, measure
from model.machine import available_memory, usable_cores
from model.source import locate
from model.weights import open_checkpoint
from model.weights.checkpoint import Checkpoint
from server.config import InspectSettings
from server.startup import check_length, read_tokenizer

PROBE_BYTES = 256 << 20
"""Memory that is read to see how fast that goes: beyond any processor's cache."""
RUNTIME_BYTES = 400 << 20
"""What a server takes beside weights and cache: Python, torch, tokenizer (measured, docs/performance.md)."""
MIB, GIB = 1 << 20, 1 << 30


def inspect(settings: InspectSettings, console: Console, screen: Console) -> int:
    """Print the report on `console`, news on `screen`; ModelError for what cannot be served."""
    path = locate(settings.model, settings.revision, settings.cache_folder, screen.print)
    checkpoint = open_checkpoint(path, dict(settings.config_fields))
    config = checkpoint.config
    tokens = read_tokenizer(path, checkpoint, settings.tokenizer).vocab_size
    max_model_len = check_length(settings.max_model_len, config)
    wishes = Wishes(settings.device, settings.dtype, settings.kernels, settings.quantize, settings.threads)
    backend = choose_backend(wishes, config)
    footprint = measure(checkpoint, backend.ops)
    free = available_memory(backend.ops.device)
    lengths = context_lengths(max_model_len)
    memory = [RUNTIME_BYTES + footprint.memory + cache_bytes(config, backend.ops, n) for n in lengths]
    speeds = estimate(settings, config, backend, footprint, lengths)
    if settings.json_output:
        print(json.dumps(report(path, checkpoint, footprint, lengths, memory, speeds)), file=console.file)
    else:
        console.print(facts(path, config, tokens, backend, footprint))
        console.print(weights(footprint))
        console.print(contexts(lengths, memory, speeds, free))
        if backend.note is not None:
            console.print(f"note: {backend.note}")
    if memory[0] > free:
        raise ModelError(
            f"{path}: needs {memory[0] / GIB:.2f} GiB for {lengths[0]:,} tokens of context, and "
            f"{free / GIB:.2f} GiB are free; take a smaller or a quantised model, or free memory"
        )
    return 0


def context_lengths(most: int) -> list[int]:
    """A kibitoken, four times as many, and so on up to the model's limit."""
    lengths = []
    length = 1024
    while length < most:
        lengths.append(length)
        length *= 4
    return [*lengths, most]


def estimate(
    settings: InspectSettings,
    config: ModelConfig,
    backend: Backend,
    footprint: Footprint,
    lengths: Sequence[int],
) -> list[float] | None:
    """Tokens a second of one stream at these lengths; None on a GPU, whose memory is not probed.

    A step reads the active weights and the sequence's keys and values once, at a share of the bandwidth.
    """
    if backend.ops.device.type != "cpu":
        return None
    bandwidth = Bandwidth(settings.threads or usable_cores(), PROBE_BYTES)
    read = 1e9 * SHARE_OF_BANDWIDTH * max(bandwidth.measure() for _ in range(5))
    return [read / (footprint.read + cache_bytes(config, backend.ops, length)) for length in lengths]


def facts(path: Path, config: ModelConfig, tokens: int, backend: Backend, footprint: Footprint) -> Table:
    """What the model is."""
    table = Table(show_header=False, box=None, pad_edge=False)
    active = ""
    if config.experts is not None:
        active = f", {footprint.active_parameters / 1e6:,.1f} M of them active for a token"
    heads = f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} for keys and values"
    rows = {
        "model": str(path),
        "family": config.architecture,
        "parameters": f"{footprint.parameters / 1e6:,.1f} M{active}",
        "layers": f"{config.num_layers} of width {config.hidden_size}, {heads}",
        "attention": "; ".join(_attention(config)),
        "feed-forward": _feed_forward(config),
        "vocabulary": f"{config.vocab_size:,} rows, {tokens:,} tokens",
        "context": f"{config.max_position_embeddings:,} tokens",
        "runs on": backend.description,
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def weights(footprint: Footprint) -> Table:
    """Quantisation and size by tensor; a star stands for every layer and every expert."""
    table = Table(
        "tensors", "of", "in the file", "M numbers", "MiB here", title="weights", title_justify="left"
    )
    for column in table.columns[3:]:
        column.justify = "right"
    for part in footprint.parts:
        numbers, memory = f"{part.numbers / 1e6:,.2f}", f"{part.memory / MIB:,.1f}"
        table.add_row(part.name, str(part.tensors), ", ".join(part.kinds), numbers, memory)
    table.add_section()
    table.add_row("all", "", "", f"{footprint.parameters / 1e6:,.2f}", f"{footprint.memory / MIB:,.1f}")
    return table


def contexts(
    lengths: Sequence[int], memory: Sequence[int], speeds: Sequence[float] | None, free: int
) -> Table:
    """Memory and speed of one stream by the length of its context."""
    title = f"one stream, {free / GIB:.1f} GiB free"
    table = Table("tokens of context", "memory", "", title=title, title_justify="left")
    table.columns[0].justify = table.columns[1].justify = "right"
    if speeds is not None:
        table.add_column("tokens a second, about", justify="right")
    for i, (length, size) in enumerate(zip(lengths, memory, strict=True)):
        row = [f"{length:,}", f"{size / GIB:.2f} GiB", "fits" if size <= free else "too much"]
        table.add_row(*row, *([] if speeds is None else [f"{speeds[i]:.0f}"]))
    return table


def report(
    path: Path,
    checkpoint: Checkpoint,
    footprint: Footprint,
    lengths: Sequence[int],
    memory: Sequence[int],
    speeds: Sequence[float] | None,
) -> dict[str, object]:
    """The same for programs."""
    config = checkpoint.config
    return {
        "model": str(path),
        "family": config.architecture,
        "parameters": footprint.parameters,
        "active_parameters": footprint.active_parameters,
        "weight_bytes": footprint.memory,
        "max_position_embeddings": config.max_position_embeddings,
        "weights": [
            {"name": part.name, "tensors": part.tensors, "kinds": part.kinds, "bytes": part.memory}
            for part in footprint.parts
        ],
        "contexts": [
            {"tokens": length, "bytes": size, "tokens_per_second": None if speeds is None else speeds[i]}
            for i, (length, size) in enumerate(zip(lengths, memory, strict=True))
        ],
    }


def _attention(config: ModelConfig) -> list[str]:
    """Each kind of layer with its number."""
    counts: dict[LayerConfig, int] = {}
    for layer in config.layers:
        kind = LayerConfig(layer.rope, layer.window)
        counts[kind] = counts.get(kind, 0) + 1
    texts = []
    for layer, count in counts.items():
        rotary = "no rotation" if layer.rope is None else f"rotary base {layer.rope.theta:,.0f}"
        if layer.rope is not None and layer.rope.scaling is not None:
            rotary += f" with {type(layer.rope.scaling).__name__} scaling"
        window = "" if layer.window is None else f", a window of {layer.window:,}"
        texts.append(f"{count} layers with {rotary}{window}")
    return texts


def _feed_forward(config: ModelConfig) -> str:
    experts = config.experts
    if experts is None:
        return f"{config.intermediate_size} wide, {config.hidden_act}"
    shared = f" and {experts.num_shared} shared" if experts.num_shared else ""
    count = sum(layer.experts for layer in config.layers)
    return (
        f"{experts.per_token} of {experts.count} experts{shared} in {count} layers, "
        f"{experts.intermediate_size} wide, {config.hidden_act}"
    )

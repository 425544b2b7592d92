"""Steps of the resident model beside the plain read bandwidth, in one process, in turn, round after round.

A step must read every weight once and each sequence's keys and values once. That, by its time, is given as
a share of the bandwidth that was read just before and after it. The last line is JSON.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import table as tables
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import loader
from model.backend import Wishes, choose_backend
from model.bandwidth import Bandwidth
from model.batch import Batch, Chunk, SamplingParams
from model.errors import ModelError
from model.kv_cache import bytes_per_token
from model.machine import usable_cores
from model.runner import Runner
from model.source import locate
from model.transformer import Transformer
from model.weights import open_checkpoint
from server.config import ModelSettings

CALLS = 5
"""Steps a round of each case; a round's figure is their median."""


@dataclass(frozen=True, slots=True)
class Case:
    """A step of `sequences`, each with `context` tokens in the cache and `count` more to compute."""

    name: str
    sequences: int
    context: int
    count: int = 1


CASES = (
    Case("1 sequence, 16 tokens of context", 1, 16),
    Case("1 sequence, 1,000 tokens", 1, 1000),
    Case("8 sequences, 128 tokens", 8, 128),
    Case("32 sequences, 128 tokens", 32, 128),
    Case("32 sequences, 1,000 tokens", 32, 1000),
    Case("prefill of 128", 1, 0, 128),
    Case("prefill of 512", 1, 0, 512),
)


def weight_bytes(model: Transformer) -> int:
    """Bytes of what a step reads of the weights: all but an embedding that is not the output, too."""
    total = 0
    for name, weight in model.parameters():
        if name == "embedding" and not model.config.tie_embeddings:
            continue
        if isinstance(weight, torch.Tensor):
            total += weight.nbytes
        else:
            size = model.ops._lib.panel_bytes
            total += sum(size(part.outputs, part.inputs, part.bits) for part in weight.segments())
    return total


def make_batch(case: Case, vocabulary: int, block_size: int, groups: int) -> Batch:
    """Greedy sequences of random tokens, each in blocks of its own."""
    length = case.context + case.count
    blocks = -(-length // block_size)
    chunks = (
        Chunk(
            str(index),
            random.choices(range(vocabulary), k=length),
            case.context,
            case.count,
            (range(index * blocks, (index + 1) * blocks),) * groups,
            length,
            SamplingParams(),
        )
        for index in range(case.sequences)
    )
    return Batch(tuple(chunks))


def make(given: argparse.Namespace, cases: Sequence[Case]) -> tuple[Runner, Transformer, str]:
    """The model with a cache that holds the largest case (ModelError)."""
    path = locate(given.model, None, ModelSettings().cache_folder, lambda text: print(text, file=sys.stderr))
    checkpoint = open_checkpoint(path)
    wishes = Wishes(kernels=given.kernels, quantize=given.quantize, threads=given.threads)
    backend = choose_backend(wishes, checkpoint.config)
    longest = max(case.context + case.count for case in cases)
    model = loader.load_model(checkpoint, backend.ops, longest)
    layout = model.ops.cache_layout(model.config.num_kv_heads, model.config.head_dim)
    size = layout.block_size
    blocks = max(case.sequences * -(-(case.context + case.count) // size) for case in cases)
    rows = max(case.sequences * case.count for case in cases)
    counts = (blocks,) * len(model.config.cache_groups)
    runner = loader.make_runner(model, counts, rows, max(case.sequences for case in cases))
    for layer in runner.graph.cache.layers:  # what was never written would be read from one page of zeros
        layer.keys.normal_()
        layer.values.normal_()
    return runner, model, backend.description


def measure(given: argparse.Namespace, cases: Sequence[Case]) -> dict[str, Any]:
    """All rounds; times in milliseconds, bandwidths in GB/s (ModelError)."""
    runner, model, description = make(given, cases)
    cache = runner.graph.cache
    sizes = model.config.vocab_size, cache.block_size, len(cache.groups)
    batches = [make_batch(case, *sizes) for case in cases]
    weights = weight_bytes(model)
    per_token = bytes_per_token(model.config, cache.layers[0].keys.dtype)
    bandwidth = Bandwidth(given.threads, given.memory_mib << 20)
    times: list[list[float]] = [[] for _ in cases]
    shares: list[list[float]] = [[] for _ in cases]
    read: list[float] = []
    for batch in batches:
        runner.execute(batch)
    moved = [weights + case.sequences * (case.context + case.count) * per_token for case in cases]
    for _ in range(given.rounds):
        before = bandwidth.measure()
        read.append(before)
        for index, batch in enumerate(batches):
            spent = statistics.median(_seconds(runner, batch) for _ in range(CALLS))
            after = bandwidth.measure()
            read.append(after)
            times[index].append(spent * 1000)
            shares[index].append(moved[index] / spent / 1e9 / ((before + after) / 2))
            before = after
    rows = [
        asdict(case)
        | {"ms": _spread(times[index]), "bytes": moved[index]}
        | {"gb_per_second": round(moved[index] / statistics.median(times[index]) / 1e6, 2)}
        | {"share_of_bandwidth": _spread(shares[index])}
        for index, case in enumerate(cases)
    ]
    return {
        "machine": tables.machine(given.threads),
        "model": given.model,
        "backend": description,
        "rounds": given.rounds,
        "weight_bytes": weights,
        "kv_bytes_per_token": per_token,
        "bandwidth": {"reader": bandwidth.reader, "gb_per_second": _spread(read), "trials": bandwidth.trials},
        "steps": rows,
    }


def _seconds(runner: Runner, batch: Batch) -> float:
    started = time.perf_counter()
    runner.execute(batch)
    return time.perf_counter() - started


def _spread(values: Sequence[float]) -> dict[str, float]:
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 3) for name, value in spread.items()}


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    read = report["bandwidth"]
    speed = read["gb_per_second"]
    console.print(
        f"{report['model']}: {report['backend']}; load before: {report['machine']['load_before']}\n"
        f"plain read ({read['reader']}): median {speed['median']:.1f} GB/s, "
        f"{speed['min']:.1f} to {speed['max']:.1f}",
        soft_wrap=True,
    )
    shown = Table("step", title=f"medians of {report['rounds']} rounds (smallest to largest)")
    for name in ("ms", "MB to read", "GB/s", "share of the bandwidth beside it"):
        shown.add_column(name, justify="right")
    for row in report["steps"]:
        ms, share = row["ms"], row["share_of_bandwidth"]
        shown.add_row(
            row["name"],
            f"{ms['median']:.2f} ({ms['min']:.2f} to {ms['max']:.2f})",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['gb_per_second']:.1f}",
            f"{share['median']:.0%} ({share['min']:.0%} to {share['max']:.0%})",
        )
    console.print(shown)
    console.print("A prefill is bound by arithmetic: its share says only that it does not wait for memory.")


def main() -> int:
    """Run it; the exit status is 1 if the model cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder, .gguf file or hub id")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of the model and of the reader")
    parser.add_argument("--rounds", type=int, default=7, help="each case and the read so often, in turn")
    parser.add_argument("--kernels", default="auto", help="as of `rivulet serve`")
    parser.add_argument("--quantize", default="auto", help="as of `rivulet serve`")
    parser.add_argument("--memory-mib", type=int, default=1024, help="what one read goes through")
    parser.add_argument("--quick", action="store_true", help="short contexts, to try this script")
    given = parser.parse_args()
    cases = (*CASES[:1], Case("4 sequences, 100 tokens", 4, 100)) if given.quick else CASES
    try:
        report = measure(given, cases)
    except ModelError as error:
        print(f"step: {error}", file=sys.stderr)
        return 1
    show(report)
    print(json.dumps(report))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

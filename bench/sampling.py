"""What choosing a step's tokens takes: each cut, by the kernels and by torch's ops in turn, on equal logits.

Logits are the model's own, at the last tokens of a story, and random ones, flatter than any model's: their
nucleus is a third of the vocabulary. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import table
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import loader
from model.backend import Wishes, choose_backend
from model.batch import Batch, Chunk, SamplingParams
from model.errors import ModelError
from model.machine import usable_cores
from model.ops.base import Ops
from model.ops.native import NativeOps
from model.ops.sampling import SamplingOps, TorchSampling
from model.source import locate
from model.weights import open_checkpoint
from model.weights.checkpoint import Checkpoint
from server.config import ModelSettings
from server.startup import read_tokenizer

CUTS: dict[str, dict[str, Any]] = {
    "temperature alone": {},
    "min-p 0.05": {"min_p": 0.05},
    "top-k 50": {"top_k": 50},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "top-p 0.9": {"top_p": 0.9},
    "typical-p 0.9": {"typical_p": 0.9},
}
STORY = (
    "Once upon a time there was a small village by the sea, and in it lived a fisherman who told stories to "
    "the children every evening. One day he said: my friends, listen well, for today I will tell you of the "
    "storm that came in the year"
)


def logits_of_story(path: Path, checkpoint: Checkpoint, ops: Ops, rows: int) -> Tensor:
    """[rows, vocabulary]: what the model says of its last tokens, again and again if they are fewer."""
    token_ids = read_tokenizer(path, checkpoint).encode(STORY)
    count = len(token_ids)
    runner = loader.make_runner(loader.load_model(checkpoint, ops, count), (count,), count, count)
    tables = (range(count),) * len(runner.graph.cache.groups)
    chunk = Chunk("story", token_ids, 0, count, tables, count, SamplingParams())
    wanted = range(max(count - rows, 0), count)
    logits = runner.graph.run(Batch((chunk,)), wanted).logits
    return logits.repeat(-(-rows // len(wanted)), 1)[:rows].contiguous()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each cut by each of those that choose (ModelError)."""
    path = locate(given.model, None, ModelSettings().cache_folder, lambda text: print(text, file=sys.stderr))
    checkpoint = open_checkpoint(path)
    ops = choose_backend(Wishes(kernels=given.kernels, threads=given.threads), checkpoint.config).ops
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    kinds = {
        "a story's": logits_of_story(path, checkpoint, ops, given.rows).float(),
        "standard normal": torch.randn(given.rows, checkpoint.config.vocab_size),
    }
    samplers: dict[str, SamplingOps] = {"torch's ops": TorchSampling()}
    if isinstance(ops, NativeOps):
        samplers = {ops.name: ops.sampling, **samplers}
    uniforms = torch.rand(given.rows).tolist()
    figures = []
    for kind, logits in kinds.items():
        for name, cut in CUTS.items():
            params = [SamplingParams(temperature=0.8, **cut)] * given.rows
            times: dict[str, list[float]] = {sampler: [] for sampler in samplers}
            for _ in range(given.rounds):
                for sampler, chooser in samplers.items():
                    started = time.perf_counter()
                    chooser.draw(logits, params, uniforms)
                    times[sampler].append((time.perf_counter() - started) * 1000)
            ms = {sampler: round(statistics.median(each), 2) for sampler, each in times.items()}
            figures.append({"logits": kind, "cut": name, "ms": ms})
    return {"machine": table.machine(given.threads), "rows": given.rows, "figures": figures}


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    shown = Table("logits", "cut", title=f"ms for {report['rows']} rows, medians", title_justify="left")
    for sampler in report["figures"][0]["ms"]:
        shown.add_column(sampler, justify="right")
    for row in report["figures"]:
        ms = (f"{value:.2f}" for value in row["ms"].values())
        shown.add_row(row["logits"], row["cut"], *ms)
    Console().print(shown)


def main() -> int:
    """Run it; the exit status is 1 if the model cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder, .gguf file or hub id")
    parser.add_argument("--rows", type=int, default=32, help="sequences of a step")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of the kernels and of torch")
    parser.add_argument("--rounds", type=int, default=15, help="each cut so often by each, in turn")
    parser.add_argument("--kernels", default="auto", help="as of `rivulet serve`")
    given = parser.parse_args()
    try:
        report = measure(given)
    except ModelError as error:
        print(f"sampling: {error}", file=sys.stderr)
        return 1
    show(report)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

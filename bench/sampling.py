"""What choosing a step's tokens takes: each cut, by the kernels and by torch's ops in turn, on equal logits.

Logits are random: normal ones times 3, whose most likely tokens mostly hold the nucleus, as a model's do, and
standard normal ones, flatter than any model's. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import table as tables
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model.backend import Wishes, choose_backend
from model.batch import SamplingParams
from model.errors import ModelError
from model.machine import usable_cores
from model.ops.native import NativeOps
from model.ops.sampling import SamplingOps, TorchSampling
from model.source import locate
from model.weights import open_checkpoint
from server.config import ModelSettings

CUTS: dict[str, dict[str, Any]] = {
    "temperature alone": {},
    "min-p 0.05": {"min_p": 0.05},
    "top-k 50": {"top_k": 50},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "top-p 0.9": {"top_p": 0.9},
    "typical-p 0.9": {"typical_p": 0.9},
}
SPREADS = (3.0, 1.0)
"""Standard deviations of the logits."""


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each cut by each of those that choose (ModelError)."""
    path = locate(given.model, None, ModelSettings().cache_folder, lambda text: print(text, file=sys.stderr))
    config = open_checkpoint(path).config
    backend = choose_backend(Wishes(kernels=given.kernels, threads=given.threads), config)
    torch.set_num_threads(given.threads)
    samplers: dict[str, SamplingOps] = {"torch's ops": TorchSampling()}
    if isinstance(backend.ops, NativeOps):
        samplers = {backend.ops.name: backend.ops.sampling, **samplers}
    torch.manual_seed(0)
    rows = []
    for spread in SPREADS:
        logits = torch.randn(given.rows, config.vocab_size) * spread
        uniforms = torch.rand(given.rows).tolist()
        for name, cut in CUTS.items():
            params = [SamplingParams(temperature=0.8, **cut)] * given.rows
            times: dict[str, list[float]] = {sampler: [] for sampler in samplers}
            for _ in range(given.rounds):
                for sampler, ops in samplers.items():
                    started = time.perf_counter()
                    ops.draw(logits, params, uniforms)
                    times[sampler].append((time.perf_counter() - started) * 1000)
            ms = {sampler: round(statistics.median(each), 2) for sampler, each in times.items()}
            rows.append({"spread": spread, "cut": name, "ms": ms})
    return {"machine": tables.machine(given.threads), "rows": given.rows, "figures": rows}


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    shown = Table("logits", "cut", title=f"ms for {report['rows']} rows, medians", title_justify="left")
    for sampler in report["figures"][0]["ms"]:
        shown.add_column(sampler, justify="right")
    for row in report["figures"]:
        ms = (f"{value:.2f}" for value in row["ms"].values())
        shown.add_row(f"normal, times {row['spread']:g}", row["cut"], *ms)
    Console().print(shown)


def main() -> int:
    """Run it; the exit status is 1 if the model cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m", help="whose vocabulary it is; as of `rivulet serve`"
    )
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

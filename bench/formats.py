"""What each GGUF format loses in the native kernels, and how fast it loads: the tables of docs/models.md.

Weights and loading on a random Llama whose widths have whole super-blocks; logits on the default model, its
weights written anew in each format, beside the float32 logits of the same numbers. The tests have
the writer: `PYTHONPATH=tests python bench/formats.py`. The last line is JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from checkpoints import make_llama, read_metadata, tensors_of
from gguf_files import write_gguf
from harness import Drive
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import loader
from model.backend import Wishes, choose_backend
from model.ops.base import Ops
from model.ops.native import NativeOps
from model.ops.panels import Matrix
from model.ops.reference import TorchOps
from model.source import locate
from model.transformer import Transformer
from model.weights import open_checkpoint
from server.config import ModelSettings
from server.text.tokenizer import Tokenizer

BLOCKS = ("BF16", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
SUPER_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "heads": 16, "kv_heads": 4, "head_dim": 64}
PROMPT, STEPS = 200, 100


def native(path: Path) -> NativeOps:
    """The fastest kernels here for a checkpoint, as `rivulet serve` takes them."""
    ops = choose_backend(Wishes(), open_checkpoint(path).config).ops
    assert isinstance(ops, NativeOps), "the native kernels do not run here"
    return ops


def load(path: Path, ops: Ops) -> Transformer:
    """The model, for as long a text as is run."""
    return loader.load_model(open_checkpoint(path), ops, PROMPT + STEPS)


def of_weights(path: Path) -> dict[str, float]:
    """Seconds to load, as megabytes of the file a second, and the relative error of all matrices together."""
    ops = native(path)
    started = time.perf_counter()
    model = load(path, ops)
    seconds = time.perf_counter() - started
    error = size = 0.0
    weights = dict(model.parameters())
    for name, stored in tensors_of(open_checkpoint(path)):
        weight = weights[name]
        if isinstance(weight, Matrix):
            (panels,), numbers = weight.segments(), stored.dequantise().float()
            held = torch.empty_like(numbers)
            ops._lib.read_rows(panels, 0, weight.outputs, held.data_ptr())
            error += float((held - numbers).double().square().sum())
            size += float(numbers.double().square().sum())
    return {"weights": (error / size) ** 0.5, "load_mb_per_second": path.stat().st_size / seconds / 1e6}


def run(path: Path, ops: Ops, token_ids: list[int]) -> Tensor:
    """[steps, vocabulary]: teacher-forced logits."""
    drive = Drive(load(path, ops), blocks=64)
    trace = drive.add("a", token_ids[:PROMPT], forced=token_ids[PROMPT:])
    drive.run()
    return torch.stack(trace.logits).double()


def of_logits(path: Path, token_ids: list[int]) -> dict[str, float]:
    """Relative error of the logits, and the mean Kullback-Leibler divergence in nats."""
    exact = run(path, TorchOps(torch.device("cpu"), torch.float32), token_ids)
    ours = run(path, native(path), token_ids)
    p, q = exact.log_softmax(1), ours.log_softmax(1)
    divergence = float((p.exp() * (p - q)).sum(1).mean())
    return {"logits": float((exact - ours).norm() / exact.norm()), "divergence": divergence}


def main() -> None:
    """Measure all formats, or some."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("formats", nargs="*", default=[*BLOCKS, *SUPER_BLOCKS], help="as GGUF names them")
    given = parser.parse_args()
    cache = ModelSettings().cache_folder
    source = locate("smollm2-135m", None, cache, lambda text: print(text, file=sys.stderr))
    token_ids = Tokenizer.from_gguf(read_metadata(source)).encode(Path("README.md").read_text())
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wide = make_llama(folder / "wide", tie=True, vocab_size=8192, **SHAPE)
        small = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        for kind in track(given.formats, console=Console(stderr=True), transient=True):
            results[kind] = of_weights(write_gguf(wide, folder / "wide.gguf", kind=kind))
            if kind not in SUPER_BLOCKS:  # no width of the default model is made of them
                path = write_gguf(small, folder / "small.gguf", kind=kind)
                results[kind] |= of_logits(path, token_ids[: PROMPT + STEPS])
    columns = ("weights", "logits", "divergence", "load_mb_per_second")
    table = Table("format", *columns)
    for kind, figures in results.items():
        table.add_row(kind, *(f"{figures[column]:.4g}" if column in figures else "" for column in columns))
    Console().print(table)
    print(json.dumps({"threads": torch.get_num_threads(), "formats": results}))


if __name__ == "__main__":
    main()

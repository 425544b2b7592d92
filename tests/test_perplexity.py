"""The default model predicts real text on the native kernels as it does in float32 on the same weights."""

import math
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import read_metadata, tensors_of
from harness import make_ops

from model import loader
from model.backend import VARIANTS
from model.batch import Batch, Chunk, SamplingParams
from model.graph import Graph, make_graph
from model.kv_cache import KVCache
from model.ops.panels import REPACKED
from model.weights import open_checkpoint
from server.text.tokenizer import Tokenizer

WINDOW = 512
WINDOWS = 17
"""With 511 predictions each: more than 8,192 in all."""
ROWS = 64
BLOCK = 16


@dataclass
class Measured:
    """Sums over all predictions, in nats."""

    surprise: float = 0.0
    divergence: float = 0.0
    """KL(reference || ours)."""
    same_best: int = 0


def graph_of(op_set: str, path: Path) -> Graph:
    model = loader.load_model(open_checkpoint(path), make_ops(op_set), WINDOW)
    layout = model.ops.cache_layout(model.config.num_kv_heads, model.config.head_dim)
    return make_graph(model, KVCache(model.config, (WINDOW // BLOCK,), layout), WINDOW, ROWS)


def variants_here() -> list[str]:
    """Those that this machine can run."""
    found = []
    for variant in VARIANTS:
        try:
            make_ops(variant)
        except pytest.skip.Exception:
            continue
        found.append(variant)
    return found


@pytest.fixture(scope="module")
def measured(smollm2_path: Path) -> dict[str, Measured]:
    """The reference and each variant over the same windows; the reference is computed once."""
    variants = variants_here()
    if not variants:
        pytest.skip("no native kernels can run here")
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokens = Tokenizer.from_gguf(read_metadata(smollm2_path)).encode(text[:80_000])
    assert len(tokens) >= WINDOWS * WINDOW
    graphs = {name: graph_of(name, smollm2_path) for name in ("torch", *variants)}
    results = {name: Measured() for name in graphs}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for start in range(0, WINDOWS * WINDOW, WINDOW):
            _measure(graphs, tokens[start : start + WINDOW], results)
    finally:
        torch.set_num_threads(threads)
    return results


@torch.inference_mode()
def _measure(graphs: dict[str, Graph], window: list[int], results: dict[str, Measured]) -> None:
    """Add one window's predictions: each token after the first, from those before it in the window."""
    chunk = Chunk("0", window, 0, WINDOW, (range(WINDOW // BLOCK),), WINDOW, SamplingParams())
    for graph in graphs.values():
        graph.run(Batch((chunk,)))
    for first in range(0, WINDOW - 1, ROWS):
        rows = range(first, min(first + ROWS, WINDOW - 1))
        targets = torch.tensor(window[first + 1 : rows.stop + 1])[:, None]
        want = graphs["torch"].scores(rows).logits.log_softmax(-1)
        for name, graph in graphs.items():
            ours = graph.scores(rows).logits.log_softmax(-1)
            result = results[name]
            result.surprise -= float(ours.gather(-1, targets).double().sum())
            result.divergence += float((want.exp() * (want - ours)).sum(-1).double().sum())
            result.same_best += int((want.argmax(-1) == ours.argmax(-1)).sum())


def test_the_weights_are_the_same(smollm2_path: Path) -> None:
    """Panels hold every matrix of the file exactly, or the comparison would be of two models."""
    kinds = {stored.kind for _, stored in tensors_of(open_checkpoint(smollm2_path)) if len(stored.shape) == 2}
    assert kinds <= set(REPACKED)


@pytest.mark.timeout(600)  # the reference takes 20 s on two free cores, minutes on busy ones
@pytest.mark.parametrize("variant", VARIANTS)
def test_perplexity_within_half_a_percent(variant: str, measured: dict[str, Measured]) -> None:
    """What differs is int8 activations and a bfloat16 cache: noise, which can only make it a little worse."""
    make_ops(variant)
    count = WINDOWS * (WINDOW - 1)
    assert count >= 8192
    ours, reference = measured[variant], measured["torch"]
    perplexity = math.exp(reference.surprise / count)
    ratio = math.exp((ours.surprise - reference.surprise) / count)
    divergence, agreement = ours.divergence / count, ours.same_best / count
    print(
        f"\n{variant}: perplexity {perplexity * ratio:.3f}, reference {perplexity:.3f}, ratio {ratio:.5f}, "
        f"KL {divergence:.5f}, same best token {agreement:.4f}, {count} predictions"
    )
    assert 3 < perplexity < 40, "the reference itself makes sense of the text"
    assert abs(ratio - 1) < 0.005
    assert 0 < divergence < 0.005
    assert agreement > 0.95

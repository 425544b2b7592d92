"""What a step costs: a decode projects one row a sequence and copies no cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_llama
from harness import OP_SETS, Drive, Tiny
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from model import runner
from model.batch import Batch, Chunk, SamplingParams
from model.kv_cache import LayerCache, bytes_per_token
from model.ops.layout import DecodePlan
from model.ops.reference import TorchOps
from model.ops.sampling import Scores
from model.runner import SCORED_ROWS

CONTEXT = 1000
BLOCK = 16


@pytest.fixture(scope="module")
def long_tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("long")
    make_llama(folder, tie=True, max_positions=2048, seed=3, heads=4, kv_heads=2, head_dim=128)
    return Tiny(folder)


def decode_batch(contexts: list[int]) -> Batch:
    """One decode for each context; blocks in turn, as they are after a while."""
    chunks, step = [], len(contexts)
    for index, context in enumerate(contexts):
        blocks = list(range(index, index + step * (context // BLOCK + 1), step))
        tokens = [(7 * index + 3 * place) % 256 for place in range(context + 1)]
        chunks.append(Chunk(f"{index}", tokens, context, 1, (blocks,), context, SamplingParams()))
    return Batch(tuple(chunks))


def drive_with(tiny: Tiny, sequences: int) -> Drive:
    drive = tiny.drive(blocks=sequences * (CONTEXT // BLOCK + 2))
    drive.cache.fill(range(drive.pool.num_blocks), 0.5)
    return drive


@contextmanager
def projected_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of every matrix product with a weight."""
    rows: list[int] = []
    linear, logits = TorchOps.linear, TorchOps.logits

    def counting_linear(self: TorchOps, x: Tensor, *given: Any) -> Tensor:
        rows.append(len(x))
        return linear(self, x, *given)

    def counting_logits(self: TorchOps, x: Tensor, *given: Any) -> Tensor:
        rows.append(len(x))
        return logits(self, x, *given)

    with monkeypatch.context() as patch:
        patch.setattr(TorchOps, "linear", counting_linear)
        patch.setattr(TorchOps, "logits", counting_logits)
        yield rows


@pytest.mark.parametrize("sequences", [1, 5])
def test_a_decode_projects_one_row_a_sequence(
    long_tiny: Tiny, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = drive_with(long_tiny, sequences)
    with projected_rows(monkeypatch) as rows:
        drive.runner.execute(decode_batch([CONTEXT] * sequences))
    assert set(rows) == {sequences}
    assert len(rows) == 4 * long_tiny.config.num_layers + 1  # qkv, output, gate and up, down; logits


def test_a_decodes_flops_are_one_rows(long_tiny: Tiny) -> None:
    """Matrix products with weights: two per weight; nothing else grows with the context but attention."""
    drive = drive_with(long_tiny, 1)
    weights = sum(w.numel() for _, w in long_tiny.model.parameters() if w.dim() == 2)
    for context in (10, CONTEXT):
        with FlopCounterMode(display=False) as counter:
            drive.runner.execute(decode_batch([context]))
        assert counter.get_total_flops() == 2 * weights, context


def allocated(drive: Drive, batch: Batch) -> int:
    """Bytes that a step allocates, whatever it frees again, seen at the allocator."""
    drive.runner.execute(batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        drive.runner.execute(batch)
    return sum(max(event.self_cpu_memory_usage, 0) for event in profiler.events())


def cache_bytes(tiny: Tiny, tokens: int) -> int:
    """What the keys and values of so many tokens take."""
    return tokens * bytes_per_token(tiny.config, torch.float32)


@pytest.mark.parametrize("sequences", [1, 4])
def test_a_decode_copies_no_cache(long_tiny: Tiny, sequences: int) -> None:
    """What a step allocates grows with the context by scores and indices, far less than keys and values."""
    drive = drive_with(long_tiny, sequences)
    short = allocated(drive, decode_batch([BLOCK] * sequences))
    long = allocated(drive, decode_batch([CONTEXT] * sequences))
    assert long - short < cache_bytes(long_tiny, sequences * (CONTEXT - BLOCK)) / 8


def test_the_measure_sees_a_copied_cache(long_tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inverse: an attention that gathers its keys and values allocates at least that much more."""
    drive = drive_with(long_tiny, 1)
    batch = decode_batch([CONTEXT])
    honest = allocated(drive, batch)
    decode = TorchOps._decode

    def copying(self: TorchOps, query: Tensor, cache: LayerCache, plan: DecodePlan) -> Tensor:
        cache.key_slots[:CONTEXT].clone()
        cache.value_slots[:CONTEXT].clone()
        return decode(self, query, cache, plan)

    monkeypatch.setattr(TorchOps, "_decode", copying)
    assert allocated(drive, batch) - honest >= cache_bytes(long_tiny, CONTEXT)


def test_logits_only_for_the_rows_that_are_sampled(long_tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    logits = TorchOps.logits

    def counting(self: TorchOps, x: Tensor, *given: Any) -> Tensor:
        sizes.append(len(x))
        return logits(self, x, *given)

    monkeypatch.setattr(TorchOps, "logits", counting)
    drive = long_tiny.drive(budget=64)
    drive.add("a", list(range(150)), max_tokens=3)
    drive.add("scored", list(range(40)), max_tokens=1, params=SamplingParams(prompt_logprobs=0))
    drive.run()
    # 150 tokens in three chunks give one row, the two decodes one each; the scored prompt gives its rows.
    assert sum(sizes) == 1 + 2 + 1 + 39


def test_rows_are_kept_where_a_prompt_is_scored_and_nowhere_else(
    long_tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer need not go on with the others."""
    kept: list[bool] = []
    drive = long_tiny.drive(budget=64)
    compute = drive.runner.graph.run

    def watched(batch: Batch, rows: Sequence[int], *, keeps: bool) -> Scores:
        kept.append(keeps)
        return compute(batch, rows, keeps=keeps)

    monkeypatch.setattr(drive.runner.graph, "run", watched)
    drive.add("plain", list(range(100)), max_tokens=2)
    drive.run()
    assert kept == [False] * 3  # two chunks and a decode
    drive.add("scored", list(range(40)), max_tokens=1, params=SamplingParams(prompt_logprobs=0))
    drive.add("beside it", list(range(10)), max_tokens=1)
    drive.run()
    assert kept[3:] == [True]


def largest_allocation(drive: Drive, vocabulary: int) -> float:
    """The most that one op allocates in a step that scores a prompt of 1,000 tokens, in rows of logits."""
    params = SamplingParams(prompt_logprobs=3)
    tokens = [index % 250 for index in range(CONTEXT)]
    chunk = Chunk("a", tokens, 0, CONTEXT, (range(CONTEXT // BLOCK + 1),), CONTEXT, params)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        (result,) = drive.runner.execute(Batch((chunk,))).results
    assert len(result.prompt_tokens) == CONTEXT - 1
    most = max(event.self_cpu_memory_usage for event in profiler.events())
    return most / (vocabulary * torch.float32.itemsize)


@pytest.mark.parametrize("op_set", OP_SETS)
def test_scoring_a_prompt_never_holds_all_its_logits(
    tmp_path: Path, op_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the prompt is, 64 rows of the vocabulary exist at a time; that more would be seen, too."""
    vocabulary = 20_000
    make_llama(tmp_path, tie=True, max_positions=2048, seed=3, head_dim=32, vocab_size=vocabulary)
    tiny = Tiny(tmp_path, op_set=op_set)
    drive = tiny.drive(budget=CONTEXT, max_running=2)
    assert 0 < largest_allocation(drive, vocabulary) <= SCORED_ROWS
    if op_set == "torch":
        monkeypatch.setattr(runner, "SCORED_ROWS", 10 * SCORED_ROWS)
        assert largest_allocation(drive, vocabulary) > SCORED_ROWS
    else:  # a buffer made once
        assert len(drive.runner.graph._scores.logits) == SCORED_ROWS


def test_a_call_is_one_prefill_and_then_one_token_decodes(long_tiny: Tiny) -> None:
    drive = long_tiny.drive()
    drive.add("a", list(range(100)), max_tokens=20)
    drive.run()
    assert [chunk.count for batch in drive.batches for chunk in batch.chunks] == [100] + [1] * 19


def test_decodes_and_a_prefill_share_a_pass(long_tiny: Tiny) -> None:
    drive = long_tiny.drive(budget=32)
    drive.add("a", [1, 2, 3], max_tokens=10)
    drive.step()
    drive.add("b", list(range(100)), max_tokens=2)
    drive.step()
    assert {chunk.request_id: chunk.count for chunk in drive.batches[-1].chunks} == {"a": 1, "b": 31}
    assert torch.isfinite(drive.traces["a"].logits[-1]).all()

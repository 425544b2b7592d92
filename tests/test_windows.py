"""Sliding windows give their blocks back: what no row to come can see is free again while a sequence runs.

On a model whose layers all have a window and on one of both kinds: the logits are transformers' while blocks
are given back and poisoned, no more is held than the window needs, and prefixes, forks and preemption go on.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_cuda_ops
import torch
from checkpoints import byte_tokenizer
from families import make_family
from harness import OP_SETS, Drive, Tiny, Trace
from live import LiveServer
from test_mutations import Fault, mutate
from test_oracle import errors_by_step, noise_floor, random_tokens
from test_rows import assert_same, prompt_of

from model import loader
from model.batch import HOLE, SamplingParams
from model.config import most_blocks
from model.errors import ModelError
from model.kv_cache import bytes_per_token
from model.loader import CacheSize
from model.ops.base import Ops
from model.ops.cuda import CudaOps
from model.ops.layout import BatchLayout
from model.ops.reference import TorchOps
from model.transformer import Transformer
from model.weights import open_checkpoint
from server.engine.block_pool import PrefixKey, root_of
from server.engine.block_tables import BlockTables

WINDOW = 20
BLOCK = 16
LENGTH = 512
NAN = float("nan")
KINDS = {"all": "mistral", "some": "gemma3"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model whose layers all have a window, and one where some have."""
    made = {}
    for kind, family in KINDS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        make_family(family, made[kind], seed=3, sliding_window=WINDOW)
    return made


@pytest.fixture(scope="module", params=KINDS)
def windowed(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Tiny:
    """Both, on torch's ops."""
    return Tiny(folders[request.param])


@pytest.fixture(scope="module")
def mixed(folders: dict[str, Path]) -> Tiny:
    """The one where some layers have a window, on torch's ops."""
    return Tiny(folders["some"])


@pytest.fixture(scope="module", params=[(ops, kind) for ops in OP_SETS for kind in KINDS], ids="-".join)
def any_windowed(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Tiny:
    """Both, on each op set."""
    op_set, kind = request.param
    return Tiny(folders[kind], op_set=op_set)


def pools_of(tiny: Tiny, full: int, few: int) -> list[int]:
    """Blocks by group: `full` where no window is, `few` where one is."""
    return [full if group.window is None else few for group in tiny.config.cache_groups]


def held(drive: Drive) -> Iterator[tuple[int, int]]:
    """The window and the blocks held of each table in a group with one."""
    for sequence in drive.scheduler._running:
        tables = zip(drive.pools, sequence.block_tables, sequence.given_back, strict=True)
        for pool, table, given_back in tables:
            if pool.window is not None:
                yield pool.window, len(table) - given_back


def run_within_bounds(drive: Drive) -> None:
    """Step until idle; whenever rows are about to be computed, no more is held than they see."""
    budget, execute = drive.scheduler.token_budget, drive._execute

    def checked(batch: Any) -> Any:
        for window, count in held(drive):
            assert count <= -(-(window + budget) // BLOCK) + 1
        return execute(batch)

    drive._execute = checked  # type: ignore[method-assign]
    drive.run()


@pytest.fixture(scope="module")
def keeping() -> Callable[..., Trace]:
    """What a request gets alone where nothing is given back, once for each."""
    known: dict[tuple[object, ...], Trace] = {}

    def alone(tiny: Tiny, prompt: Sequence[int], max_tokens: int, seed: int | None = None) -> Trace:
        key = (tiny.path, tiny.op_set, tuple(prompt), max_tokens, seed)
        if key not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(BlockTables, "_first_seen", lambda self, pool, position: 0)
                plain = lambda window, *sizes: most_blocks(None, *sizes)  # noqa: E731
                patch.setattr("server.engine.block_tables.most_blocks", plain)
                drive = tiny.drive(prefix_cache=False)
                known[key] = drive.add("alone", prompt, max_tokens=max_tokens, params=sampled(seed))
                drive.run()
        return known[key]

    return alone


def sampled(seed: int | None) -> SamplingParams:
    return SamplingParams() if seed is None else SamplingParams(temperature=1.0, seed=seed)


# -- the rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 7, 50])
def test_logits_are_the_references_while_blocks_are_given_back(windowed: Tiny, budget: int) -> None:
    """A prompt in chunks and its output; the holes stand for a block that holds not-a-number all along."""
    teacher_forced(windowed, budget)


def teacher_forced(tiny: Tiny, budget: int) -> None:
    drive = with_poisoned_holes(tiny, budget + 2)
    given = {name: random_tokens(90, tiny.config.vocab_size, seed) for seed, name in enumerate("ab")}
    traces = {name: drive.add(name, ids[:60], forced=ids[60:]) for name, ids in given.items()}
    run_within_bounds(drive)
    for name, ids in given.items():
        errors = errors_by_step(traces[name].logits, tiny.reference_logits(ids), 60)
        assert max(errors) <= 10 * noise_floor(tiny, ids), errors  # which not-a-number is not


def with_poisoned_holes(tiny: Tiny, budget: int) -> Drive:
    """Nobody gets the block that holes stand for: it holds not-a-number all along."""
    drive = tiny.drive(budget=budget, prefix_cache=False, poison=NAN, blocks=40)
    for pool in drive.pools:
        pool._free.move_to_end(HOLE)
    return drive


@pytest.mark.parametrize("budget", [5, 40])
def test_nobody_reads_a_hole(any_windowed: Tiny, budget: int, keeping: Callable[..., Trace]) -> None:
    drive = with_poisoned_holes(any_windowed, budget)
    prompts = [prompt_of(any_windowed, length, seed=length) for length in (75, 97)]
    traces = [drive.add(f"{len(prompt)}", prompt, max_tokens=25) for prompt in prompts]
    run_within_bounds(drive)
    assert all(next(reversed(pool._free)) == HOLE for pool in drive.pools)
    for trace, prompt in zip(traces, prompts, strict=True):
        assert_same(trace, keeping(any_windowed, prompt, 25))


def test_a_request_longer_than_the_pool(any_windowed: Tiny, keeping: Callable[..., Trace]) -> None:
    """Where a window is the pool is as small as it may be, and several requests take turns in it."""
    prompts = {name: prompt_of(any_windowed, 150 + 20 * i, seed=i) for i, name in enumerate("abc")}
    few = most_blocks(WINDOW, LENGTH, 16, BLOCK)
    assert few * BLOCK < 100
    drive = any_windowed.drive(blocks=pools_of(any_windowed, 60, few), budget=16, poison=NAN)
    traces = {name: drive.add(name, prompt, max_tokens=40) for name, prompt in prompts.items()}
    run_within_bounds(drive)
    for name, prompt in prompts.items():
        assert_same(traces[name], keeping(any_windowed, prompt, 40))


def test_what_does_not_fit_alone_is_refused(windowed: Tiny) -> None:
    few = most_blocks(WINDOW, LENGTH, 16, BLOCK) - 1
    drive = windowed.drive(blocks=pools_of(windowed, 60, few), budget=16)
    drive.add("short", prompt_of(windowed, few * BLOCK - 8, seed=0), max_tokens=8)
    with pytest.raises(AssertionError):
        drive.add("long", prompt_of(windowed, few * BLOCK - 8, seed=0), max_tokens=9)
    drive.run()


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_requests_that_come_fork_lose_their_blocks_and_leave(
    any_windowed: Tiny, prefix_cache: bool, keeping: Callable[..., Trace]
) -> None:
    """At random over pools that are too small for all; each one that ends got what it gets alone."""
    tiny = any_windowed
    prompts = [prompt_of(tiny, length, seed=length) for length in (5, 30, 33, 70, 90)]
    prompts.append(prompts[3][:50] + prompts[1][:30])
    draw = random.Random(6)
    options = {"blocks": pools_of(tiny, 14, 9), "budget": 24, "max_running": 5, "prefix_cache": prefix_cache}
    drive = tiny.drive(**options, poison=NAN, shuffle_blocks=1)
    asked: dict[str, list[int]] = {}
    for step in range(300):
        if step < 30 and draw.random() < 0.6:
            name, leader = f"{step}", None
            if asked and draw.random() < 0.4:
                leader = draw.choice(list(asked))
            asked[name] = asked[leader] if leader else draw.choice(prompts)
            drive.add(name, asked[name], max_tokens=18, params=sampled(step % 2), fork_of=leader)
        if asked and draw.random() < 0.05:
            drive.scheduler.abort(draw.choice(list(asked)))
        if not drive.step() and step >= 30:
            break
    assert drive.scheduler.idle
    ended = [name for name, trace in drive.traces.items() if trace.done]
    for name in ended:
        assert_same(drive.traces[name], keeping(tiny, asked[name], 18, int(name) % 2))
    assert drive.scheduler.stats.preemptions
    assert len(ended) > 10


@pytest.mark.parametrize("length", [BLOCK * 2 + WINDOW % BLOCK, 45, 60])
def test_forks_that_begin_with_the_prompt(windowed: Tiny, length: int, keeping: Callable[..., Trace]) -> None:
    """It is computed once, wherever the window's end lies in a block."""
    prompt = prompt_of(windowed, length, seed=length)
    drive = windowed.drive(prefix_cache=False, poison=NAN)
    for choice in range(3):
        leader = None if choice == 0 else "0"
        drive.add(f"{choice}", prompt, max_tokens=10, params=sampled(choice), fork_of=leader)
    drive.run()
    rows = sum(chunk.count for batch in drive.batches for chunk in batch.chunks if chunk.start < length)
    assert rows == length + 2
    for choice in range(3):
        assert_same(drive.traces[f"{choice}"], keeping(windowed, prompt, 10, choice))


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_fork_whose_leader_has_left_the_prompt_behind(
    windowed: Tiny, prefix_cache: bool, keeping: Callable[..., Trace]
) -> None:
    """It finds the given back blocks, or computes the prompt itself."""
    prompt = prompt_of(windowed, 45, seed=1)
    drive = windowed.drive(prefix_cache=prefix_cache, poison=NAN)
    drive.add("0", prompt, max_tokens=60, params=sampled(0))
    for _ in range(50):
        drive.step()
    drive.add("1", prompt, max_tokens=10, params=sampled(1), fork_of="0")
    drive.run()
    first = next(chunk for batch in drive.batches for chunk in batch.chunks if chunk.request_id == "1")
    assert first.start == (2 * BLOCK if prefix_cache else 0)
    assert_same(drive.traces["1"], keeping(windowed, prompt, 10, 1))


# -- prefixes ------------------------------------------------------------------------------------------


def longest_hit(drive: Drive, prompt: Sequence[int]) -> int:
    """Tokens of the longest prefix of which everything is there that the row after it sees, found plainly."""
    found: list[list[bool]] = []
    parent = root_of(0)
    for start in range(0, len(prompt) - 1 - (len(prompt) - 1) % BLOCK, BLOCK):
        key = PrefixKey(parent, tuple(prompt[start : start + BLOCK]))
        parent = key.content
        found.append([pool.find(key) is not None for pool in drive.pools])
    for count in range(len(found), 0, -1):
        seen = [0 if p.window is None else max(0, count * BLOCK + 1 - p.window) for p in drive.pools]
        needed = [(g, i) for g, first in enumerate(seen) for i in range(first // BLOCK, count)]
        if all(found[index][group] for group, index in needed):
            return count * BLOCK
    return 0


def test_full_and_partial_hits(any_windowed: Tiny, keeping: Callable[..., Trace]) -> None:
    shared = prompt_of(any_windowed, 100, seed=1)
    prompts = {
        "first": shared,
        "again": shared,
        "a part": shared[:53] + prompt_of(any_windowed, 30, seed=2),
        "longer": [*shared, *prompt_of(any_windowed, 40, seed=3)],
        "other": prompt_of(any_windowed, 60, seed=4),
    }
    drive = any_windowed.drive(poison=NAN, budget=40)
    for name, prompt in prompts.items():
        drive.add(name, prompt, max_tokens=12)
        drive.run()
    cached = {name: trace.outputs[0].cached_tokens for name, trace in drive.traces.items()}
    assert cached == {"first": 0, "again": 96, "a part": 48, "longer": 96, "other": 0}
    for name, prompt in prompts.items():
        assert_same(drive.traces[name], keeping(any_windowed, prompt, 12))


def test_hits_while_given_back_blocks_are_used_again(windowed: Tiny, keeping: Callable[..., Trace]) -> None:
    """As long as what is left allows: whole, shorter and none; what one misses is not read."""
    draw = random.Random(5)
    prompts = [prompt_of(windowed, 100, seed=seed) for seed in range(4)]
    kinds = set()
    for few in (9, 12):
        drive = windowed.drive(blocks=pools_of(windowed, 80, few), budget=40, poison=NAN)
        for turn in range(14):
            prompt = draw.choice(prompts)[: draw.choice([40, 70, 100])]
            want = longest_hit(drive, prompt)
            name = f"{turn}"
            drive.add(name, prompt, max_tokens=5)
            drive.run()
            assert drive.traces[name].outputs[0].cached_tokens == want
            assert_same(drive.traces[name], keeping(windowed, prompt, 5))
            kinds.add(
                "none" if not want else "whole" if want == (len(prompt) - 1) // BLOCK * BLOCK else "part"
            )
    assert kinds == {"none", "part", "whole"}


def test_a_prefix_that_only_layers_without_a_window_have_is_none(mixed: Tiny) -> None:
    tiny = mixed
    shared = prompt_of(tiny, 100, seed=1)
    drive = tiny.drive(blocks=[60, 8], budget=40)
    drive.add("first", shared, max_tokens=2)
    drive.run()
    drive.add(
        "other", prompt_of(tiny, 120, seed=2), max_tokens=2
    )  # takes all blocks of the small pool in turn
    drive.run()
    key = PrefixKey(root_of(0), tuple(shared[:BLOCK]))
    assert [pool.find(key) is not None for pool in drive.pools] == [True, False]
    again = drive.add("again", shared, max_tokens=2)
    drive.run()
    assert again.outputs[0].cached_tokens == 0
    assert_same(again, drive.traces["first"])


# -- CUDA, and the sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pages_of_256_tokens(folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Tiny(folders[kind])
    drive = test_cuda_ops.cuda_drive(
        folders[kind],
        test_cuda_ops.device_for_test(monkeypatch),
        blocks=pools_of(tiny, 8, 5),
        budget=90,
        prefix_cache=False,
        poison=NAN,
    )
    given = {name: random_tokens(500, tiny.config.vocab_size, seed) for seed, name in enumerate("ab")}
    for name, ids in given.items():
        drive.add(name, ids[:480], forced=ids[480:])
    drive.run()
    starts = [chunk.start for batch in drive.batches for chunk in batch.chunks]
    assert max(starts) > 256 + WINDOW  # a page was given back
    for name, ids in given.items():
        want = tiny.reference_logits(ids)[479:-1]
        ours = torch.stack(drive.traces[name].logits).float().cpu()
        assert float((ours - want).abs().mean()) < 0.05 * float(want.std())


def model_of(folder: Path, ops: Ops) -> Transformer:
    return loader.load_model(open_checkpoint(folder), ops, LENGTH)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [16, 256])
def test_memory_is_divided(folders: dict[str, Path], kind: str, block_size: int) -> None:
    """What was asked for goes to the group that sees furthest; a window what all who run can hold of it."""
    cpu = torch.device("cpu")
    ops = TorchOps(cpu, torch.float32) if block_size == 16 else CudaOps(cpu, torch.bfloat16)
    model = model_of(folders[kind], ops)
    size = partial(loader.size_cache, model, max_model_len=LENGTH, max_running=2, token_budget=30)
    limit = 2 * min(-(-LENGTH // block_size), -(-(WINDOW + 30) // block_size) + 1)
    for tokens in (block_size, 512, 100_000):
        asked = -(-tokens // block_size)
        blocks, line = size(CacheSize(tokens=tokens))
        assert blocks == ((asked,) if kind == "all" else (asked, min(asked, limit)))
        assert f"{asked * block_size:,} tokens" in line
        assert f"window of {WINDOW}" in line
    dtype = ops.cache_layout(2, 32).dtype
    groups = model.config.cache_groups
    each = [block_size * bytes_per_token(model.config, dtype, group) for group in groups]
    for memory in (sum(each), 7 * sum(each) + 5, 500 * sum(each)):
        blocks, _ = size(CacheSize(bytes=memory))
        taken = sum(count * one for count, one in zip(blocks, each, strict=True))
        more = each[0] + sum(one for count, one in zip(blocks[1:], each[1:], strict=True) if count < limit)
        assert taken <= memory < taken + more
    with pytest.raises(ModelError, match="KV cache of 0 tokens"):
        size(CacheSize(bytes=each[0] - 1))


def test_the_longest_request_that_a_cache_holds(folders: dict[str, Path]) -> None:
    """Where all layers have a window it may be longer than the cache."""
    every, some = (
        model_of(folder, TorchOps(torch.device("cpu"), torch.float32)) for folder in folders.values()
    )
    enough = most_blocks(WINDOW, LENGTH, 30, BLOCK)
    assert loader.longest_sequence(every, (enough,), LENGTH, 30) == LENGTH > enough * BLOCK
    assert loader.longest_sequence(every, (enough - 1,), LENGTH, 30) == (enough - 1) * BLOCK
    assert loader.longest_sequence(some, (10, enough), LENGTH, 30) == 10 * BLOCK
    assert loader.longest_sequence(some, (100, enough), LENGTH, 30) == LENGTH


def test_a_server_whose_cache_is_smaller_than_its_requests(
    folders: dict[str, Path], serve: Callable[..., LiveServer]
) -> None:
    """Over HTTP: the same text as where the cache is large."""
    byte_tokenizer(folders["all"])
    few = most_blocks(WINDOW, LENGTH, 16, BLOCK) * BLOCK
    body = {"inputs": "a" * 150, "parameters": {"max_new_tokens": 40, "seed": 1, "do_sample": True}}
    texts = []
    for tokens in (few, 4096):
        server = serve(
            folders["all"], dtype="float32", kv_cache_tokens=tokens, token_budget=16, max_running=4
        )
        with server.client() as client:
            assert client.get("/info").json()["kv_cache_tokens"] == tokens
            assert client.get("/info").json()["max_total_tokens"] == LENGTH > few
            answer = client.post("/generate", json=body)
            assert answer.status_code == 200, answer.text
            texts.append(answer.json()["generated_text"])
    assert texts[0] == texts[1] != ""


# -- that the tests above would see a fault ---------------------------------------------------------------

FAULTS = {
    "a block too early": Fault(
        BlockTables, "advance", "sequence.num_computed - 1)", "sequence.num_computed - 1 + self.block_size)"
    ),
    "never": Fault(BlockTables, "advance", "if first > given_back", "if first > given_back and False"),
    "written by another group's table": Fault(
        TorchOps, "rotate_and_store", "inputs.slots[cache.group]", "inputs.slots[0]"
    ),
    "read by another group's table": Fault(
        BatchLayout, "_slots", "chunk.block_tables[group]", "chunk.block_tables[0]"
    ),
    "found though a row needs more": Fault(BlockTables, "_match", "run >= after - first for", "run >= 1 for"),
    "a fork of what is gone": Fault(BlockTables, "_has_prompt", "return all(", "return True or all("),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_seen(
    mixed: Tiny, name: str, keeping: Callable[..., Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = mixed
    detectors: tuple[Callable[[], None], ...] = (
        lambda: teacher_forced(tiny, 7),
        lambda: test_hits_while_given_back_blocks_are_used_again(tiny, keeping),
        lambda: test_a_fork_whose_leader_has_left_the_prompt_behind(tiny, False, keeping),
    )
    mutate(FAULTS[name], monkeypatch)
    assert any(fails(detector) for detector in detectors)


def fails(detector: Callable[[], None]) -> bool:
    try:
        detector()
    except Exception:
        return True
    return False

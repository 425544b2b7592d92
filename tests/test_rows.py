"""Row i of a pass depends on row i's sequence only: chunking, neighbours, placement, reuse, preemption.

Every test runs on each op set and compares whole logits with a run of the request alone on a fresh
engine: on the native kernels to the last bit, on torch's ops within a tolerance far below any fault.
"""

import random
from collections.abc import Sequence

import pytest
import torch
from harness import Tiny, Trace

from server.engine.block_pool import PrefixKey

BLOCK = 16


@pytest.fixture(name="tiny")
def each_op_set(any_tiny: Tiny) -> Tiny:
    return any_tiny


def prompt_of(tiny: Tiny, length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(tiny.config.vocab_size) for _ in range(length)]


def assert_same(trace: Trace, alone: Trace) -> None:
    assert trace.tokens == alone.tokens
    assert len(trace.logits) == len(alone.logits)
    for step, (ours, want) in enumerate(zip(trace.logits, alone.logits, strict=True)):
        gap = float((ours - want).abs().max())
        assert gap <= trace.tolerance, f"step {step}: {gap}"


def alone(tiny: Tiny, prompt: Sequence[int], **options: object) -> Trace:
    drive = tiny.drive(prefix_cache=False)
    trace = drive.add("alone", prompt, **options)
    drive.run()
    return trace


@pytest.mark.parametrize("length", range(1, 3 * BLOCK + 2))
def test_any_chunk_size_gives_the_same_logits(tiny: Tiny, length: int) -> None:
    prompt = prompt_of(tiny, length, seed=length)
    want = alone(tiny, prompt, forced=[0])
    reference = tiny.reference_logits(prompt)[-1]
    for budget in sorted({1, 2, 3, 7, 16, max(1, length - 1), length, 1000}):
        drive = tiny.drive(budget=budget, max_running=1, poison=float("nan"))
        trace = drive.add("a", prompt, forced=[0])
        drive.run()
        assert drive.batches[0].chunks[0].count == min(budget, length)
        assert_same(trace, want)
        if tiny.op_set == "torch":
            assert float((trace.logits[0] - reference).abs().max()) <= trace.tolerance, budget


@pytest.mark.parametrize("poison", [float("nan"), 1e4])
def test_neighbours_placement_and_poisoned_blocks_change_nothing(tiny: Tiny, poison: float) -> None:
    """Needle: one request among random others that come, leave and finish at random."""
    needle = prompt_of(tiny, 45, seed=0)
    want = alone(tiny, needle, max_tokens=20)
    for seed in range(6):
        draw = random.Random(seed)
        drive = tiny.drive(budget=draw.choice([8, 24, 64]), max_running=8, poison=poison, shuffle_blocks=seed)
        trace = None
        for step in range(400):
            if step == seed:
                trace = drive.add("needle", needle, max_tokens=20)
            if draw.random() < 0.3 and step < 60:
                prompt = needle[: draw.randrange(1, 45)] if draw.random() < 0.3 else []
                prompt = prompt + prompt_of(tiny, draw.randrange(1, 50), seed=draw.randrange(1000))
                drive.add(f"{step}", prompt, max_tokens=draw.randrange(1, 20))
            if draw.random() < 0.1 and drive.traces:
                victim = draw.choice(list(drive.traces))
                if victim != "needle":
                    drive.scheduler.abort(victim)
            if not drive.step() and step > 60:
                break
        assert trace is not None
        assert trace.done
        assert all(torch.isfinite(row).all() for row in trace.logits)
        assert_same(trace, want)


def test_the_order_of_requests_does_not_matter(tiny: Tiny) -> None:
    prompts = {f"r{i}": prompt_of(tiny, 5 + 9 * i, seed=i) for i in range(6)}
    want = {name: alone(tiny, prompt) for name, prompt in prompts.items()}
    for seed in range(3):
        names = list(prompts)
        random.Random(seed).shuffle(names)
        drive = tiny.drive(budget=40, max_running=6)
        for name in names:
            drive.add(name, prompts[name])
        drive.run()
        for name in names:
            assert_same(drive.traces[name], want[name])


def test_a_short_request_in_the_blocks_of_a_long_one(tiny: Tiny) -> None:
    long, short = prompt_of(tiny, 100, seed=1), prompt_of(tiny, 9, seed=2)
    drive = tiny.drive(blocks=8, prefix_cache=False, poison=None)
    drive.add("long", long, max_tokens=20)
    drive.run()
    trace = drive.add("short", short, max_tokens=20)
    drive.run()
    assert_same(trace, alone(tiny, short, max_tokens=20))


class TestPrefixCache:
    def test_hit_partial_hit_and_fork(self, tiny: Tiny) -> None:
        shared = prompt_of(tiny, 3 * BLOCK, seed=1)
        prompts = {
            "first": shared + prompt_of(tiny, 10, seed=2),
            "again": shared + prompt_of(tiny, 10, seed=2),
            "fork": shared + prompt_of(tiny, 21, seed=3),
            "within a block": shared[: 2 * BLOCK + 5] + prompt_of(tiny, 30, seed=4),
            "exactly the prefix": shared,
            "one block": shared[:BLOCK],
        }
        drive = tiny.drive(poison=float("nan"))
        for name, prompt in prompts.items():
            drive.add(name, prompt, max_tokens=12)
            drive.run()
        cached = {name: trace.outputs[0].cached_tokens for name, trace in drive.traces.items()}
        assert cached == {
            "first": 0,
            "again": 3 * BLOCK,
            "fork": 3 * BLOCK,
            "within a block": 2 * BLOCK,
            "exactly the prefix": 2 * BLOCK,  # one token is left to compute
            "one block": 0,
        }
        for name, prompt in prompts.items():
            assert_same(drive.traces[name], alone(tiny, prompt, max_tokens=12))

    def test_the_output_is_reused_too(self, tiny: Tiny) -> None:
        prompt = prompt_of(tiny, 30, seed=5)
        drive = tiny.drive()
        first = drive.add("first", prompt, max_tokens=30)
        drive.run()
        turn = [*prompt, *first.tokens, *prompt_of(tiny, 5, seed=6)]
        second = drive.add("second", turn)
        drive.run()
        assert second.outputs[0].cached_tokens == 59 // BLOCK * BLOCK  # the last token was never computed
        assert_same(second, alone(tiny, turn))

    def test_a_shared_block_outlives_the_request_that_made_it(self, tiny: Tiny) -> None:
        prompt = prompt_of(tiny, 40, seed=7)
        drive = tiny.drive(blocks=16, poison=float("nan"))
        drive.add("maker", prompt, max_tokens=2)
        drive.run()
        sharer = drive.add("sharer", prompt, max_tokens=30)
        drive.step()
        for i in range(6):  # as much as evicts every free block
            drive.add(f"other{i}", prompt_of(tiny, 60, seed=20 + i), max_tokens=4)
        drive.run()
        assert_same(sharer, alone(tiny, prompt, max_tokens=30))

    def test_off_reuses_nothing(self, tiny: Tiny) -> None:
        prompt = prompt_of(tiny, 40, seed=8)
        drive = tiny.drive(prefix_cache=False)
        for name in ("a", "b"):
            drive.add(name, prompt)
            drive.run()
        assert drive.traces["b"].outputs[0].cached_tokens == 0
        assert_same(drive.traces["b"], drive.traces["a"])

    def test_colliding_hashes_do_not_mix_texts(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(PrefixKey, "__hash__", lambda key: 0)
        drive = tiny.drive()
        prompts = [prompt_of(tiny, 50, seed=seed) for seed in range(5)]
        prompts.append(prompts[0][:BLOCK] + prompts[1][BLOCK:])  # known blocks in an order that is new
        for index, prompt in enumerate(prompts):
            drive.add(f"{index}", prompt)
            drive.run()
        for index, prompt in enumerate(prompts):
            assert_same(drive.traces[f"{index}"], alone(tiny, prompt))
        assert drive.traces["5"].outputs[0].cached_tokens == BLOCK


def test_a_pool_that_runs_dry_preempts_and_changes_nothing(tiny: Tiny) -> None:
    prompts = {f"r{i}": prompt_of(tiny, 20 + 5 * i, seed=i) for i in range(6)}
    for prefix_cache in (True, False):
        drive = tiny.drive(blocks=8, budget=32, max_running=6, prefix_cache=prefix_cache, poison=float("nan"))
        for name, prompt in prompts.items():
            drive.add(name, prompt, max_tokens=40)
        drive.run()
        assert drive.scheduler.stats.preemptions > 0
        for name, prompt in prompts.items():
            assert_same(drive.traces[name], alone(tiny, prompt, max_tokens=40))


@pytest.mark.parametrize("moment", ["queued", "prefill", "decode"])
def test_abort_at_any_point_leaves_the_neighbours_alone(tiny: Tiny, moment: str) -> None:
    drive = tiny.drive(budget=16, max_running=1 if moment == "queued" else 4)
    neighbour = drive.add("neighbour", prompt_of(tiny, 25, seed=1), max_tokens=20)
    drive.add("victim", prompt_of(tiny, 60, seed=2), max_tokens=20)
    for _ in range({"queued": 1, "prefill": 3, "decode": 9}[moment]):
        drive.step()
    victim = drive.scheduler._by_id["victim"]
    stage = "queued" if not victim.block_tables else "decode" if victim.num_output else "prefill"
    assert stage == moment
    drive.scheduler.abort("victim")
    drive.scheduler.abort("victim")
    drive.scheduler.check()
    drive.run()
    assert not drive.traces["victim"].done
    assert_same(neighbour, alone(tiny, prompt_of(tiny, 25, seed=1), max_tokens=20))


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK - 1, 4 * BLOCK, 4 * BLOCK + 1])
def test_block_boundaries_with_guards(tiny: Tiny, length: int) -> None:
    """Blocks that the request does not own keep their pattern to the last bit."""
    drive = tiny.drive(blocks=12, shuffle_blocks=length)
    prompt = prompt_of(tiny, length, seed=length)
    for layer in drive.cache.layers:
        layer.keys.fill_(123.0)
        layer.values.fill_(-321.0)
    trace = drive.add("a", prompt, max_tokens=BLOCK + 1)
    drive.run()
    used = {block for batch in drive.batches for chunk in batch.chunks for block in chunk.block_tables[0]}
    unused = [block for block in range(12) if block not in used]
    assert unused
    assert len(used) == -(-(length + BLOCK) // BLOCK)
    for layer in drive.cache.layers:
        assert bool((layer.keys[unused] == 123.0).all())
        assert bool((layer.values[unused] == -321.0).all())
    assert_same(trace, alone(tiny, prompt, max_tokens=BLOCK + 1))


@pytest.mark.parametrize("prompt_length", [510, 511])
def test_up_to_exactly_the_context(tiny: Tiny, prompt_length: int) -> None:
    limit = tiny.config.max_position_embeddings
    prompt = prompt_of(tiny, prompt_length, seed=prompt_length)
    trace = alone(tiny, prompt, max_tokens=limit - prompt_length)
    assert len(trace.tokens) == limit - prompt_length
    assert all(torch.isfinite(row).all() for row in trace.logits)
    if tiny.op_set == "torch":
        reference = tiny.reference_logits([*prompt, *trace.tokens[:-1]])[prompt_length - 1 :]
        for ours, want in zip(trace.logits, reference, strict=True):
            assert float((ours - want).abs().max()) <= trace.tolerance

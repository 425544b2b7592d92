"""Several choices of one prompt: computed once, full blocks shared, the one that all go on writing copied.

Each choice must get what it gets alone, on each op set: on the native kernels to the last bit. What
happens to the leader (ended, aborted, failed, preempted) must not show in its forks.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from harness import Drive, Tiny
from live import LiveServer
from test_rows import BLOCK, alone, assert_same, prompt_of
from wire import metric

from model.batch import Copy, SamplingParams
from model.kv_cache import KVCache
from server.engine.block_tables import BlockTables
from server.engine.request import FinishReason

LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 2, 2 * BLOCK, 2 * BLOCK + 1, 45]


@pytest.fixture(name="tiny")
def each_op_set(any_tiny: Tiny) -> Tiny:
    return any_tiny


def params_of(choice: int) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=100 + choice)


def add_choices(
    drive: Drive, prompt: Sequence[int], count: int, max_tokens: int = 20, first: int = 0, **more: object
) -> None:
    """Choices `first` and so on; all but the first are its forks."""
    for choice in range(first, first + count):
        leader = None if choice == first else f"{first}"
        drive.add(f"{choice}", prompt, max_tokens, params=params_of(choice), fork_of=leader, **more)


def assert_as_alone(tiny: Tiny, drive: Drive, prompt: Sequence[int], max_tokens: int = 20) -> None:
    """Every choice that was not given up got the tokens and logits that it gets alone."""
    finished = {name: trace for name, trace in drive.traces.items() if trace.done}
    assert finished
    for name, trace in finished.items():
        assert_same(trace, alone(tiny, prompt, max_tokens=max_tokens, params=params_of(int(name))))


def prompt_rows(drive: Drive) -> int:
    """Rows of prompts that were computed so far."""
    chunks = (chunk for batch in drive.batches for chunk in batch.chunks)
    return sum(max(0, min(chunk.stop, chunk.prompt_length) - chunk.start) for chunk in chunks)


def copies(drive: Drive) -> int:
    return sum(len(batch.copies) for batch in drive.batches)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_prompt_is_computed_once(tiny: Tiny, length: int, prefix_cache: bool) -> None:
    prompt = prompt_of(tiny, length, seed=length)
    drive = tiny.drive(prefix_cache=prefix_cache, poison=float("nan"), shuffle_blocks=length)
    add_choices(drive, prompt, 4)
    drive.step()
    drive.step()
    tables = [sequence.block_tables[0] for sequence in drive.scheduler._running]
    whole = (length - 1) // BLOCK
    assert len(tables) == 4
    assert all(table[:whole] == tables[0][:whole] for table in tables)
    assert drive.pool.num_used == whole + sum(len(table) - whole for table in tables)
    assert copies(drive) == (3 if (length - 1) % BLOCK else 0)
    drive.run()
    assert prompt_rows(drive) == length + 3  # each fork computes the row that its first token comes from
    assert [trace.outputs[0].cached_tokens for trace in drive.traces.values()] == [0] * 4
    assert drive.scheduler.stats.prompt_tokens == length
    assert len({tuple(trace.tokens) for trace in drive.traces.values()}) == 4
    assert_as_alone(tiny, drive, prompt)


@pytest.mark.parametrize("budget", [1, 3, 16, 40])
def test_prompts_in_chunks_beside_others(tiny: Tiny, budget: int) -> None:
    prompt, other = prompt_of(tiny, 50, seed=1), prompt_of(tiny, 37, seed=2)
    drive = tiny.drive(budget=budget, poison=1e4, prefix_cache=False)
    add_choices(drive, other, 2, first=10)
    add_choices(drive, prompt, 3)
    add_choices(drive, other, 2, first=20)
    drive.run()
    if budget >= 16:  # else decodes take all there is, and leaders may end before their forks can start
        assert prompt_rows(drive) == 50 + 2 + 2 * (37 + 1)
    for name, trace in drive.traces.items():
        own = prompt if int(name) < 10 else other
        assert_same(trace, alone(tiny, own, max_tokens=20, params=params_of(int(name))))


@pytest.mark.parametrize("length", [20, 2 * BLOCK])
def test_forks_that_find_a_place_late(tiny: Tiny, length: int) -> None:
    """The leader has gone on writing into the block that is copied: nobody reads what is not the prompt."""
    prompt = prompt_of(tiny, length, seed=3)
    drive = tiny.drive(max_running=2, prefix_cache=False, poison=float("nan"))
    drive.add("50", prompt_of(tiny, 9, seed=4), max_tokens=6, params=params_of(50))
    drive.add("0", prompt, max_tokens=30, params=params_of(0))
    for choice in range(1, 4):
        drive.add(f"{choice}", prompt, max_tokens=4, params=params_of(choice), fork_of="0")
    drive.run()
    assert prompt_rows(drive) == 9 + length + 3
    for choice, most in enumerate((30, 4, 4, 4)):
        want = alone(tiny, prompt, max_tokens=most, params=params_of(choice))
        assert_same(drive.traces[f"{choice}"], want)


def test_a_fork_that_comes_when_the_prompt_is_computed_already(tiny: Tiny) -> None:
    prompt = prompt_of(tiny, 40, seed=5)
    drive = tiny.drive(prefix_cache=False)
    add_choices(drive, prompt, 1)
    for _ in range(5):
        drive.step()
    drive.add("1", prompt, max_tokens=20, params=params_of(1), fork_of="0")
    drive.add("2", prompt, max_tokens=20, params=params_of(2), fork_of="1")
    drive.run()
    drive.add("3", prompt, max_tokens=20, params=params_of(3), fork_of="0")  # which is not there any more
    drive.run()
    assert prompt_rows(drive) == 40 + 2 + 40
    assert_as_alone(tiny, drive, prompt)


def test_a_fork_of_a_fork_waits_for_the_same_leader(tiny: Tiny) -> None:
    prompt = prompt_of(tiny, 40, seed=6)
    drive = tiny.drive(budget=16, prefix_cache=False)
    add_choices(drive, prompt, 2)
    drive.add("2", prompt, max_tokens=20, params=params_of(2), fork_of="1")
    drive.step()
    drive.scheduler.abort("1")
    drive.run()
    assert prompt_rows(drive) == 40 + 1
    assert_as_alone(tiny, drive, prompt)


class TestLeader:
    """Whatever becomes of the leader."""

    @pytest.mark.parametrize("prefix_cache", [True, False])
    def test_ends_with_its_first_token(self, tiny: Tiny, prefix_cache: bool) -> None:
        """Its blocks are free again before a fork could share them; the prefix cache serves full ones."""
        prompt = prompt_of(tiny, 40, seed=7)
        drive = tiny.drive(prefix_cache=prefix_cache)
        add_choices(drive, prompt, 3, max_tokens=1)
        drive.run()
        assert prompt_rows(drive) == 40 + 2 * (8 if prefix_cache else 40)
        assert copies(drive) == 0
        assert_as_alone(tiny, drive, prompt, max_tokens=1)

    @pytest.mark.parametrize(
        ("moment", "fails"),
        [("queued", False), ("prefill", False), ("decode", False), ("prefill", True), ("decode", True)],
    )
    def test_is_gone(self, tiny: Tiny, moment: str, fails: bool) -> None:
        prompt = prompt_of(tiny, 40, seed=8)
        drive = tiny.drive(budget=16, max_running=1 if moment == "queued" else 2, prefix_cache=False)
        before = drive.add("50", prompt_of(tiny, 5, seed=9), max_tokens=3, params=params_of(50))
        add_choices(drive, prompt, 3)
        behind = drive.add("51", prompt_of(tiny, 5, seed=10), max_tokens=3, params=params_of(51))
        for _ in range({"queued": 1, "prefill": 2, "decode": 6}[moment]):
            drive.step()
        scheduler = drive.scheduler
        leader = scheduler._by_id["0"]
        assert len(leader.forks) == (0 if moment == "decode" else 2)
        assert bool(leader.num_computed) == (moment != "queued")
        waiting = scheduler.num_waiting
        if fails:
            batch = scheduler.schedule()
            assert batch is not None
            names = [chunk.request_id for chunk in batch.chunks]
            assert "0" in names
            scheduler.fail(names, FinishReason.ERROR, "broken")
        else:
            scheduler.abort("0")
        scheduler.check()
        assert fails or scheduler.num_waiting == waiting - (moment == "queued")
        drive.run()
        assert not drive.traces["0"].done
        finished = [name for name, trace in drive.traces.items() if trace.done]
        assert {"2", "51"} <= set(finished)
        assert before.done or fails
        assert behind.done
        for name in {"1", "2"} & set(finished):
            want = alone(tiny, prompt, max_tokens=20, params=params_of(int(name)))
            assert_same(drive.traces[name], want)

    def test_is_preempted_before_its_prompt_is_computed(self, tiny: Tiny) -> None:
        """An older request takes its blocks: the forks wait behind it like anyone."""
        prompt = prompt_of(tiny, 90, seed=11)
        drive = tiny.drive(blocks=8, budget=17, prefix_cache=False, poison=float("nan"))
        older = drive.add("50", prompt_of(tiny, BLOCK, seed=12), max_tokens=40, params=params_of(50))
        drive.step()
        add_choices(drive, prompt, 3, max_tokens=5)
        scheduler = drive.scheduler
        drive.step()
        leader = scheduler._by_id["0"]
        assert leader.num_computed
        assert len(leader.forks) == 2
        scheduler._preempt(leader)
        scheduler.check()
        assert [sequence.request.id for sequence in scheduler._waiting] == ["0", "1", "2"]
        drive.run()
        assert older.done
        for choice in range(3):
            want = alone(tiny, prompt, max_tokens=5, params=params_of(choice))
            assert_same(drive.traces[f"{choice}"], want)


def test_a_pool_that_runs_dry(tiny: Tiny) -> None:
    prompt = prompt_of(tiny, 37, seed=13)
    for prefix_cache in (True, False):
        drive = tiny.drive(blocks=9, budget=32, max_running=6, prefix_cache=prefix_cache, poison=float("nan"))
        add_choices(drive, prompt, 5, max_tokens=50)
        drive.run()
        assert drive.scheduler.stats.preemptions > 0
        assert_as_alone(tiny, drive, prompt, max_tokens=50)


def test_a_held_fork_is_waiting_and_can_be_aborted(tiny: Tiny) -> None:
    prompt = prompt_of(tiny, 60, seed=14)
    drive = tiny.drive(budget=16)
    add_choices(drive, prompt, 3)
    drive.step()
    assert (drive.scheduler.num_running, drive.scheduler.num_waiting) == (1, 2)
    drive.scheduler.abort("1")
    drive.scheduler.abort("1")
    drive.scheduler.check()
    assert (drive.scheduler.num_running, drive.scheduler.num_waiting) == (1, 1)
    drive.run()
    assert not drive.traces["1"].outputs
    assert_as_alone(tiny, drive, prompt)


def test_scored_prompts_are_not_shared(tiny: Tiny) -> None:
    """The row of each prompt token is needed; a fork that wants none shares with a leader that does."""
    prompt = prompt_of(tiny, 40, seed=15)
    drive = tiny.drive()
    scored = SamplingParams(prompt_logprobs=0)
    drive.add("0", prompt, max_tokens=2, params=scored)
    drive.add("1", prompt, max_tokens=2, params=scored, fork_of="0")
    drive.add("2", prompt, max_tokens=2, fork_of="0")
    drive.run()
    assert prompt_rows(drive) == 40 + 40 + 1
    assert [sum(len(o.prompt_tokens) for o in t.outputs) for t in drive.traces.values()] == [39, 39, 0]


def test_a_prompt_that_is_only_scored(tiny: Tiny) -> None:
    prompt = prompt_of(tiny, 20, seed=16)
    drive = tiny.drive()
    add_choices(drive, prompt, 2, max_tokens=0)
    drive.run()
    assert [t.outputs[-1].finish_reason for t in drive.traces.values()] == [FinishReason.LENGTH] * 2


def test_choices_of_a_call(exact_server: LiveServer) -> None:
    """Over HTTP: equal prompts of a call are computed once; the texts are those of calls alone."""
    body = {"prompt": ["a" * 70, "b" * 50, "a" * 70], "max_tokens": 12, "temperature": 1, "ignore_eos": True}
    with exact_server.client() as client:

        def rows_of(**more: object) -> tuple[dict[str, Any], float]:
            before = metric(exact_server, "step_rows_sum")
            answer = client.post("/v1/completions", json={**body, **more})
            assert answer.status_code == 200, answer.text
            exact_server.wait_until_idle()
            return answer.json(), metric(exact_server, "step_rows_sum") - before

        answer, rows = rows_of(n=3, seed=7)
        choices = [choice["text"] for choice in answer["choices"]]
        prompt_tokens = answer["usage"]["prompt_tokens"]
        assert 190 <= prompt_tokens < 200
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        assert answer["usage"]["completion_tokens"] == 9 * 12
        computed_once = prompt_tokens * 120 // 190 + 1
        assert rows <= computed_once + 7 + 9 * 11
        for place, prompt in enumerate(body["prompt"]):
            for choice in range(3):
                alone, _ = rows_of(prompt=prompt, seed=7 + choice)
                assert alone["choices"][0]["text"] == choices[3 * place + choice]


# -- that the tests above would see a fault -----------------------------------------------------------


def choices_differ(tiny: Tiny) -> bool:
    prompt = prompt_of(tiny, 40, seed=17)
    drive = tiny.drive(prefix_cache=False)
    add_choices(drive, prompt, 3)
    drive.run()
    try:
        assert_as_alone(tiny, drive, prompt)
    except AssertionError:
        return True
    return False


def test_a_block_that_is_not_copied_is_seen(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not choices_differ(tiny)
    monkeypatch.setattr(KVCache, "copy", lambda self, pairs: None)
    assert choices_differ(tiny)


def test_a_block_that_is_written_by_two_is_seen(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The invariant of copy on write, which every step of the tests above checks."""
    fork = BlockTables._fork

    def share_too_much(self: BlockTables, sequence: object, leader: object) -> None:
        fork(self, sequence, leader)
        (table,) = sequence.block_tables
        more = leader.block_tables[0][len(table)]
        self.pools[0].share([more])
        table.append(more)

    monkeypatch.setattr(BlockTables, "_fork", share_too_much)
    with pytest.raises(AssertionError):  # a block is both source and target of a copy
        choices_differ(tiny)

    def copy_nothing(self: BlockTables, sequence: object) -> list[Copy]:
        sequence.leader = None
        return []

    monkeypatch.setattr(BlockTables, "take_over", copy_nothing)
    with pytest.raises(AssertionError, match="written and shared"):
        choices_differ(tiny)


def test_blocks_are_copied_whole(tiny: Tiny) -> None:
    cache = tiny.drive(blocks=10).cache
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        for part in (layer.keys, layer.values):
            part.copy_(torch.randn(part.shape, generator=generator))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    cache.copy([Copy(0, 7, 2), Copy(0, 7, 3), Copy(0, 0, 9)])
    source = torch.tensor([0, 1, 7, 7, 4, 5, 6, 7, 8, 0])
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys[source])
        assert torch.equal(layer.values, values[source])

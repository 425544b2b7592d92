"""Pages of the cache that are there before they are written: how many, when more, what stays."""

import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch
from families import make_family
from harness import make_ops
from test_config import LLAMA32_READ
from torch import Tensor

from model import loader, memory, prefault
from model.batch import Batch, Chunk, SamplingParams
from model.kv_cache import CacheLayout, KVCache, bytes_per_token
from model.prefault import Prefault
from model.weights import open_checkpoint

LIBC = ctypes.CDLL(None)
MIB = 1 << 20
KIB = 1 << 10
BLOCKS, AHEAD = 4096, 512
"""Each of 4 parts has so many blocks of 16 KiB: 64 MiB, of which 8 are to be ready ahead."""
PATIENCE = 30.0

pytestmark = pytest.mark.skipif(
    not os.environ.get("CI") and not memory.populate(memory.zeros((mmap.PAGESIZE,), torch.uint8)),
    reason="this system finds no pages ahead (Linux 5.14 does)",
)


def there(part: Tensor) -> float:
    """The share of a tensor's whole pages that are in memory."""
    start = -(-part.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = (part.data_ptr() + part.nbytes - start) // mmap.PAGESIZE
    states = (ctypes.c_ubyte * pages)()
    assert LIBC.mincore(ctypes.c_void_p(start), ctypes.c_size_t(pages * mmap.PAGESIZE), states) == 0
    return sum(state & 1 for state in states) / pages


def parts_of(cache: KVCache, first: int, end: int, group: int = 0) -> list[Tensor]:
    return [part for layer in cache.layers if layer.group == group for part in layer.blocks(first, end)]


def comes(state: Callable[[], bool]) -> bool:
    """Whether something is so within a time."""
    end = monotonic() + PATIENCE
    while not state() and monotonic() < end:
        sleep(0.01)
    return state()


def batch_of(*tables: list[int]) -> Batch:
    """One sequence, with a block table for each group."""
    return Batch((Chunk("a", (1,), 0, 1, tables, 1, SamplingParams()),))


@pytest.fixture(name="cache")
def of_two_layers(monkeypatch: pytest.MonkeyPatch) -> KVCache:
    monkeypatch.setattr(prefault, "AHEAD", 4 * AHEAD * 16 * KIB)
    config = replace(LLAMA32_READ, layers=LLAMA32_READ.layers[:1] * 2)
    layout = CacheLayout(16, (16 * KIB,), (16 * KIB,), torch.uint8, torch.device("cpu"))
    return KVCache(config, (BLOCKS,), layout)


def test_the_first_blocks_are_ready_and_the_others_not(cache: KVCache) -> None:
    page = memory.LARGE_PAGE // (16 * KIB)  # whose other blocks, or parts, may have asked for it
    assert not any(there(part) for part in parts_of(cache, page, BLOCKS - page))
    ready = Prefault(cache)
    assert comes(lambda: not ready._thread.is_alive())
    assert all(there(part) == 1 for part in parts_of(cache, 0, AHEAD))
    assert not any(there(part) for part in parts_of(cache, AHEAD + page, BLOCKS - page))


def test_it_stays_ahead_of_what_is_used(cache: KVCache) -> None:
    """By half of what it begins with at least, to the pool's last block."""
    ready = Prefault(cache)
    for used in (0, 100, 300, 700, 1100, 2000, 3900, BLOCKS - 1):
        end = min(used + AHEAD // 2, BLOCKS)

        def is_ahead(used: int = used, end: int = end) -> bool:
            ready.look(batch_of([7, used]))  # as each step does
            return all(there(part) == 1 for part in parts_of(cache, 0, end))

        assert comes(is_ahead), used

    def is_done() -> bool:
        ready.look(batch_of([7, BLOCKS - 1]))
        return ready._done and not ready._thread.is_alive()

    assert comes(is_done)


def test_an_old_block_asks_for_nothing(cache: KVCache) -> None:
    ready = Prefault(cache)
    assert comes(lambda: not ready._thread.is_alive())
    before = ready._thread
    ready.look(batch_of([AHEAD // 2 - 1]))
    assert ready._thread is before
    ready.look(batch_of([AHEAD // 2]))
    assert ready._thread is not before


def test_groups_have_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefault, "AHEAD", 8 * MIB)
    first = LLAMA32_READ.layers[0]
    config = replace(LLAMA32_READ, layers=(first, replace(first, window=64)))
    layout = CacheLayout(16, (16 * KIB,), (16 * KIB,), torch.uint8, torch.device("cpu"))
    cache = KVCache(config, (1536, 512), layout)
    ready = Prefault(cache)
    for group, blocks in enumerate((192, 64)):  # an eighth of each
        assert comes(lambda g=group, end=blocks: all(there(part) == 1 for part in parts_of(cache, 0, end, g)))
    assert comes(lambda: not ready._thread.is_alive())
    ready.look(batch_of([3], [500]))
    assert comes(lambda: all(there(part) == 1 for part in parts_of(cache, 0, 512, 1)))
    page = memory.LARGE_PAGE // (16 * KIB)
    assert not any(there(part) for part in parts_of(cache, 192 + page, 1536 - page))


def test_what_stands_there_stays(cache: KVCache) -> None:
    for part in parts_of(cache, 0, 8):
        part.fill_(5)
    ready = Prefault(cache)
    for part in parts_of(cache, 8, 16):
        part.fill_(6)
    assert comes(lambda: not ready._thread.is_alive())
    for part in parts_of(cache, 0, AHEAD):
        assert part[:8].eq(5).all() and part[8:16].eq(6).all() and not part[16:].any()


def test_memory_that_is_none_is_refused() -> None:
    """Where the system says no, that is the answer."""
    gone = memory.zeros((memory.REGION,), torch.uint8)
    address = gone.data_ptr()
    del gone
    given = torch.frombuffer((ctypes.c_ubyte * mmap.PAGESIZE).from_address(address), dtype=torch.uint8)
    assert not memory.populate(given)


def test_a_system_that_cannot_is_asked_once(cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(memory, "populate", lambda part: asked.append(part) is not None)
    ready = Prefault(cache)
    assert comes(lambda: not ready._thread.is_alive())
    before = ready._thread
    ready.look(batch_of([BLOCKS - 1]))
    assert ready._thread is before and len(asked) == 1


def test_a_runner_and_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_family("mistral", tmp_path)
    model = loader.load_model(open_checkpoint(tmp_path), make_ops("torch"), 64)
    block = 16 * bytes_per_token(model.config, torch.float32)
    monkeypatch.setattr(prefault, "AHEAD", 8 * block)
    runner = loader.make_runner(model, (64,), 64, 8)
    # A thread that still runs would go on with what the first step wants.
    assert comes(lambda: not runner._prefault._thread.is_alive())
    assert all(there(part) == 1 for part in parts_of(runner.graph.cache, 0, 8))
    for used, ready in ((3, 8), (4, 13), (63, 64)):

        def is_ready(used: int = used, ready: int = ready) -> bool:
            runner.execute(batch_of([used]))  # a thread that just ends is followed by one of the next step
            return runner._prefault._ready == [ready]

        assert comes(is_ready), used


def test_it_keeps_no_cache_that_nobody_uses(cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, gone = [], threading.Event()

    def populate(part: Tensor) -> bool:
        asked.append(part.nbytes)
        return gone.wait(PATIENCE)

    monkeypatch.setattr(memory, "populate", populate)
    ready = Prefault(cache)
    thread = ready._thread
    assert comes(lambda: bool(asked))
    del ready
    gone.set()
    assert comes(lambda: not thread.is_alive())
    assert asked == 4 * [prefault.PIECE * 16 * KIB]  # the piece that was under way


def test_without_a_thread_a_step_waits_for_its_pages(cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one asks again."""

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", none_left)
        ready = Prefault(cache)
        ready.look(batch_of([9]))
    assert ready._ready == [0]
    ready.look(batch_of([9]))
    assert comes(lambda: ready._ready == [10 + AHEAD])

"""Bit for bit on the native kernels: batch sizes, chunk sizes, thread counts; and threads that behave.

Every comparison is of whole rows of logits by their bits. That bits can differ is shown too.
"""

import gc
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from checkpoints import make_gguf, make_llama
from harness import TILES, make_ops, tiles_library
from torch import Tensor

from model import loader
from model.backend import VARIANTS
from model.batch import Batch, Chunk, SamplingParams
from model.graph import TapeGraph
from model.kv_cache import KVCache
from model.ops.library import Library
from model.ops.native import NativeOps
from model.transformer import Transformer
from model.weights import open_checkpoint

BLOCK = 16
LENGTH = 600
BATCH_SIZES = (1, 2, 3, 5, 8, 9, 16, 33, 64)
CHUNK_SIZES = (1, 2, 3, 7, 16, 100, 512)
VOCABULARY = 260
NO_PARAMS = SamplingParams()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Odd sizes: three groups of heads, 33 groups of the gate, a vocabulary that ends within a panel."""
    folder = tmp_path_factory.mktemp("rows")
    llama = make_llama(
        folder,
        tie=True,
        heads=6,
        kv_heads=2,
        head_dim=32,
        hidden_size=96,
        intermediate_size=1056,
        max_positions=1024,
        seed=3,
    )
    return make_gguf(llama, folder / "model.gguf", kind="Q4_0")


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain weights, a window and the other gate: what `file` has not."""
    folder = tmp_path_factory.mktemp("plain")
    make_llama(
        folder,
        tie=False,
        heads=4,
        kv_heads=2,
        head_dim=64,
        hidden_size=96,
        intermediate_size=160,
        max_positions=1024,
        seed=4,
        hidden_act="gelu_pytorch_tanh",
        window=50,
    )
    return folder


@pytest.fixture(scope="module", params=(*VARIANTS, TILES))
def variant(request: pytest.FixtureRequest) -> str:
    make_ops(request.param)  # skips where it cannot run
    return str(request.param)


def library_of(variant: str) -> Library:
    return tiles_library() if variant == TILES else Library(variant)


@pytest.fixture(scope="module", params=["4 bits", "bfloat16"])
def model(request: pytest.FixtureRequest, variant: str, file: Path, plain_file: Path) -> Transformer:
    path = file if request.param == "4 bits" else plain_file
    return loader.load_model(open_checkpoint(path), make_ops(variant, bits=16), LENGTH)


class Sequences:
    """One cache with blocks that are dealt at random, and the logits of rows that one asks for."""

    def __init__(self, model: Transformer, blocks: int = 300, seed: int = 0) -> None:
        ops = model.ops
        assert isinstance(ops, NativeOps)
        cache = KVCache(
            model.config, (blocks,), ops.cache_layout(model.config.num_kv_heads, model.config.head_dim)
        )
        cache.fill(range(blocks), float("nan"))
        self.graph = TapeGraph(model, ops, cache, 600, 64)
        self.free = random.Random(seed).sample(range(blocks), blocks)
        self.tables: dict[str, list[int]] = {}

    def pass_of(
        self,
        spans: dict[str, tuple[list[int], int, int]],
        *,
        wanted: Sequence[str] | None = None,
        keeps: bool = True,
    ) -> Tensor:
        """Name -> (tokens, start, stop); the logits of each one's last row, or of the wanted ones'."""
        chunks = []
        for name, (tokens, start, stop) in spans.items():
            table = self.tables.setdefault(name, [])
            while len(table) * BLOCK < stop:
                table.append(self.free.pop())
            chunks.append(Chunk(name, tokens, start, stop - start, (list(table),), len(tokens), NO_PARAMS))
        ends = accumulate(chunk.count for chunk in chunks)
        rows = {name: end - 1 for name, end in zip(spans, ends, strict=True)}
        selected = [rows[name] for name in (spans if wanted is None else wanted)]
        return self.graph.run(Batch(tuple(chunks)), selected, keeps=keeps).logits.clone()

    def prefill(self, name: str, tokens: list[int], chunk: int) -> Tensor:
        for start in range(0, len(tokens), chunk):
            logits = self.pass_of({name: (tokens, start, min(start + chunk, len(tokens)))})
        return logits[0]


def tokens_of(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCABULARY) for _ in range(length)]


def same_bits(one: Tensor, other: Tensor) -> bool:
    assert one.isfinite().all()
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


class TestBits:
    def test_batch_sizes(self, model: Transformer) -> None:
        """A decode step of a sequence, among 0 to 63 others with other contexts, at any place among them."""
        needle = tokens_of(41, seed=0)
        alone = Sequences(model)
        alone.prefill("needle", needle[:-1], 512)
        want = alone.pass_of({"needle": (needle, 40, 41)})[0]
        for size in BATCH_SIZES:
            some = Sequences(model, seed=size)
            others = {str(i): tokens_of(3 + 5 * (i % 13), seed=i + 1) for i in range(size - 1)}
            for name, tokens in others.items():
                some.prefill(name, tokens[:-1], 64)
            some.prefill("needle", needle[:-1], 512)
            names = list(others)
            names.insert(size // 2, "needle")
            every = {**others, "needle": needle}
            logits = some.pass_of(
                {name: (every[name], len(every[name]) - 1, len(every[name])) for name in names}
            )
            assert same_bits(logits[size // 2], want), size

    def test_chunk_sizes(self, model: Transformer) -> None:
        prompt = tokens_of(530, seed=1)
        want = Sequences(model).prefill("a", prompt, 530)
        for chunk in CHUNK_SIZES:
            ours = Sequences(model, seed=chunk).prefill("a", prompt[: 530 if chunk > 3 else 200], chunk)
            if chunk <= 3:  # a pass for each one to three tokens: a shorter prompt shows the same
                assert same_bits(ours, Sequences(model).prefill("a", prompt[:200], 200)), chunk
            else:
                assert same_bits(ours, want), chunk

    def test_every_row_of_a_chunk(self, model: Transformer) -> None:
        """Not the last one alone: rows that a prefill computes together, against one pass for each."""
        prompt = tokens_of(140, seed=2)
        single, whole = Sequences(model), Sequences(model, seed=1)
        want = torch.stack([single.pass_of({"a": (prompt, i, i + 1)})[0] for i in range(140)])
        whole.pass_of({"a": (prompt, 0, 140)})
        for start in range(0, 140, 64):
            rows = range(start, min(start + 64, 140))
            assert same_bits(whole.graph.scores(rows).logits, want[start : start + 64])

    def test_a_prefill_beside_decodes(self, model: Transformer) -> None:
        prompt, needle = tokens_of(300, seed=3), tokens_of(50, seed=4)
        alone = Sequences(model)
        want_prompt = alone.prefill("prompt", prompt, 512)
        alone.prefill("needle", needle[:-1], 512)
        want_needle = alone.pass_of({"needle": (needle, 49, 50)})[0]
        both = Sequences(model, seed=5)
        both.prefill("needle", needle[:-1], 7)
        both.pass_of({"prompt": (prompt, 0, 100)})
        logits = both.pass_of({"prompt": (prompt, 100, 300), "needle": (needle, 49, 50)})
        assert same_bits(logits[0], want_prompt)
        assert same_bits(logits[1], want_needle)

    def test_block_placements(self, model: Transformer) -> None:
        """Blocks in a row, backwards, in runs and anywhere; some sequences see more than one stretch."""
        sequences = {str(i): tokens_of(350 + 45 * i, seed=i + 50) for i in range(6)}
        blocks = list(range(300))
        shuffled = random.Random(8).sample(blocks, 300)
        runs = [
            block for first in random.Random(9).sample(blocks[::5], 60) for block in range(first, first + 5)
        ]
        logits = []
        for order in (blocks, blocks[::-1], runs, shuffled):
            some = Sequences(model)
            some.free = order[::-1]  # the last one goes first
            for name, tokens in sequences.items():
                some.prefill(name, tokens[:-1], 512)
            spans = {name: (tokens, len(tokens) - 1, len(tokens)) for name, tokens in sequences.items()}
            logits.append(some.pass_of(spans))
        assert some.tables["5"][1] != some.tables["5"][0] + 1 and runs[1] == runs[0] + 1
        assert all(same_bits(other, logits[0]) for other in logits[1:])

    @pytest.mark.parametrize("wanted", ["ab", "b", "ad", "abcd", "da", ""])
    def test_rows_that_go_on_alone(self, model: Transformer, wanted: str) -> None:
        """The last layer for the wanted rows only, and then a pass that reads the cache of all."""
        sizes = {"a": 90, "b": 41, "c": 70, "d": 33}
        texts = {name: tokens_of(size, seed=ord(name)) for name, size in sizes.items()}
        spans = {
            "a": (texts["a"], 20, 89),
            "b": (texts["b"], 39, 40),
            "c": (texts["c"], 0, 60),
            "d": (texts["d"], 31, 32),
        }
        results = []
        for keeps in (True, False):
            some = Sequences(model, seed=keeps)
            some.pass_of({name: (tokens, 0, start) for name, (tokens, start, _) in spans.items() if start})
            first = some.pass_of(spans, wanted=wanted, keeps=keeps)
            after = {name: (tokens, stop, stop + 1) for name, (tokens, _, stop) in spans.items()}
            results.append(torch.cat([first, some.pass_of(after)]))
        assert len(results[0]) == len(wanted) + 4
        assert same_bits(*results)

    def test_rows_that_are_not_kept(self, model: Transformer) -> None:
        """Nobody computes them to the end, and nobody gets them."""
        prompt, rows = tokens_of(20, seed=8), []
        for keeps in (True, False):
            some = Sequences(model)
            some.pass_of({"a": (prompt, 0, 20)}, keeps=keeps)
            if not keeps:
                with pytest.raises(AssertionError):
                    some.graph.scores([3])
                some.graph._pass.struct.narrows = 0
            rows.append(some.graph.scores([3]).logits.clone())
        assert not same_bits(*rows)

    def test_thread_counts(self, variant: str, file: Path) -> None:
        """More threads than this machine has cores, too."""
        prompt, results = tokens_of(150, seed=5), []
        for threads in (1, 2, 3, 8):
            ops = NativeOps(library_of(variant), threads)
            some = Sequences(loader.load_model(open_checkpoint(file), ops, LENGTH))
            rows = [some.prefill("a", prompt[:120], 50)]
            rows += [some.pass_of({"a": (prompt, i, i + 1)})[0] for i in range(120, 150)]
            results.append(torch.stack(rows))
        for result in results[1:]:
            assert same_bits(result, results[0])

    def test_again_and_again(self, model: Transformer) -> None:
        """Threads take their tasks in another order each time."""
        prompt = tokens_of(64, seed=6)
        some = Sequences(model)
        want = some.prefill("a", prompt, 64)
        for _ in range(100):
            assert same_bits(some.pass_of({"a": (prompt, 0, 64)})[0], want)


class TestBitsCanDiffer:
    """What the tests above look at sees the least change, wherever it is made."""

    def test_one_weight_by_one_step(self, variant: str, file: Path) -> None:
        prompt = tokens_of(60, seed=7)
        model = loader.load_model(open_checkpoint(file), make_ops(variant), LENGTH)
        want = Sequences(model).prefill("a", prompt, 60)
        layer = model.layers[0]
        for matrix in (
            layer.attention.qkv.weight.parts[2],
            layer.attention.output.weight,
            layer.mlp.gate_up.weight.parts[1],
            layer.mlp.down.weight,
        ):
            matrix._memory[0] ^= 1
            assert not same_bits(Sequences(model).prefill("a", prompt, 60), want)
            matrix._memory[0] ^= 1
            assert same_bits(Sequences(model).prefill("a", prompt, 60), want)

    def test_one_token_of_the_past(self, model: Transformer) -> None:
        prompt = tokens_of(530, seed=8)
        want = Sequences(model).prefill("a", prompt, 512)
        # A layer passes on what its window holds: two of them see 99 positions before the last one.
        past = range(530) if model.config.layers[0].window is None else range(431, 530)
        for place in (past[0], 432, 447, 448, 500, 528):
            other = list(prompt)
            other[place] = (other[place] + 1) % VOCABULARY
            assert not same_bits(Sequences(model).prefill("a", other, 512), want), place
        if past[0]:
            other = list(prompt)
            other[past[0] - 1] = (other[past[0] - 1] + 1) % VOCABULARY
            assert same_bits(Sequences(model).prefill("a", other, 512), want), "outside of every window"

    def test_one_token_of_one_head_in_the_cache(self, model: Transformer) -> None:
        prompt = tokens_of(40, seed=9)
        some = Sequences(model)
        some.prefill("a", prompt[:-1], 64)
        want = some.pass_of({"a": (prompt, 39, 40)})[0]
        cache, block = some.graph.cache.layers[0], some.tables["a"][0]
        for part in (cache.keys[block, 1, :, 3, :], cache.values[block, 1, 1, :, 1]):  # token 3
            part.neg_()
            assert not same_bits(some.pass_of({"a": (prompt, 39, 40)})[0], want)
            part.neg_()
            assert same_bits(some.pass_of({"a": (prompt, 39, 40)})[0], want)


# -- threads ------------------------------------------------------------------------------------------


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def step_of(variant: str, file: Path, threads: int, rows: int = 1) -> Callable[[], Tensor]:
    """One step after 20 tokens, to be done again and again."""
    ops = NativeOps(library_of(variant), threads)
    some = Sequences(loader.load_model(open_checkpoint(file), ops, LENGTH))
    prompt = tokens_of(20 + rows, seed=0)
    some.prefill("a", prompt[:20], 64)
    return lambda: some.pass_of({"a": (prompt, 20, 20 + rows)})


def seconds_a_step(step: Callable[[], Tensor], steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


@pytest.fixture
def two_busy_loops() -> Iterator[Callable[[], None]]:
    """Starts two processes that never wait; they end with the test."""
    loops: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        loops.extend(subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2))
        time.sleep(0.3)

    yield start
    for loop in loops:
        loop.kill()
        loop.wait()


@pytest.mark.alone
class TestThreads:
    @pytest.fixture(scope="class", params=VARIANTS)
    def variant(self, request: pytest.FixtureRequest) -> str:
        make_ops(request.param)
        return str(request.param)

    def test_an_idle_crew_uses_no_processor(self, variant: str, file: Path) -> None:
        step = step_of(variant, file, 8)
        step()
        time.sleep(0.05)  # whoever still looks for work finds none
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.02

    @pytest.mark.timeout(60)
    def test_a_thousand_short_runs_with_more_threads_than_cores(self, variant: str, file: Path) -> None:
        step = step_of(variant, file, 8)
        want = step()
        for _ in range(1000):
            got = step()
        assert same_bits(got, want)

    @pytest.mark.timeout(60)
    def test_thousands_of_runs_of_a_single_short_task(self, variant: str) -> None:
        """Runs that are over before the others wake up: late threads must not touch what is gone."""
        ops = NativeOps(library_of(variant), 8)
        for i in range(5000):
            logits = torch.zeros(1 + i % 3, 16)
            logits[:, i % 16] = 1.0
            best = ops.sampling.summarise(logits).best
            assert best == [i % 16] * len(logits)

    @pytest.mark.timeout(60)
    def test_busy_neighbours_cost_their_share(
        self, variant: str, file: Path, two_busy_loops: Callable[[], None]
    ) -> None:
        """Two loops beside two threads on two cores take half; a crew that is torn apart loses a little more.

        One that spun at its barriers would wait for whole slices of the scheduler, milliseconds each. The
        best of several tries, since the machine may have other neighbours.
        """
        step = step_of(variant, file, 2, rows=64)
        step()
        quiet = min(seconds_a_step(step, 50) for _ in range(5))
        two_busy_loops()
        busy = min(seconds_a_step(step, 200) for _ in range(5))
        print(f"{quiet * 1e6:.0f} us a step, {busy * 1e6:.0f} us beside two busy loops")
        assert busy < 5 * quiet

    def test_a_crew_that_is_freed_leaves_no_thread(self, variant: str) -> None:
        gc.collect()
        before = num_threads()
        ops = NativeOps(library_of(variant), 6)
        assert num_threads() == before + 5
        ops.sampling.summarise(torch.zeros(3, 16))
        del ops
        gc.collect()
        assert num_threads() == before

    def test_one_thread_is_the_caller(self, variant: str) -> None:
        before = num_threads()
        ops = NativeOps(library_of(variant), 1)
        ops.sampling.summarise(torch.zeros(3, 16))
        assert num_threads() == before

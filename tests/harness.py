"""Drives scheduler and runner step by step, without thread or HTTP, and sees every row's logits."""

import atexit
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from model import loader
from model.backend import VARIANTS
from model.batch import Batch, SamplingParams, StepResult, Token
from model.loader import make_runner
from model.machine import processor_flags
from model.ops.base import Ops
from model.ops.library import Library, is_built
from model.ops.native import NativeOps
from model.ops.reference import TorchOps
from model.ops.sampling import Scores
from model.sampler import Row
from model.transformer import Transformer
from model.weights import open_checkpoint
from server.engine.block_pool import BlockPool
from server.engine.request import Request, TokenOutput
from server.engine.request import Sequence as RunningSequence
from server.engine.scheduler import Scheduler

ROOT = Path(__file__).resolve().parents[1]

OP_SETS = ("torch", *VARIANTS)

TILES = "tiles in plain C++"
"""The AMX kernels with the instructions' meaning spelt out, which run on any processor."""


def make_ops(name: str, bits: int = 8) -> Ops:
    """An op set by name: torch's in float32, or a variant of the native kernels; `bits` of plain weights."""
    if name == "torch":
        return TorchOps(torch.device("cpu"), torch.float32)
    if name == TILES:
        return NativeOps(tiles_library(), threads=2, bits=bits)
    missing = VARIANTS[name] - processor_flags()
    if missing or not is_built(name):
        reason = f"this processor lacks {sorted(missing)}" if missing else "the native kernels were not built"
        pytest.skip(f"no {name} kernels: {reason}")
    return NativeOps(Library(name), threads=2, bits=bits)


@cache
def tiles_library() -> Library:
    """The kernels of the best variant that runs here, built with a model of AMX's tiles."""
    flags = {
        "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16",
        "avx512_vnni": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni",
        "avx2": "",
    }
    runs = next((name for name in flags if not VARIANTS[name] - processor_flags()), None)
    compiler = shutil.which("g++") or shutil.which("clang++")
    if runs is None or compiler is None:
        pytest.skip("no C++ compiler" if runs else "this processor lacks AVX2")
    file = Path(tempfile.mkdtemp(prefix="rivulet-tiles-")) / "tiles.so"
    atexit.register(shutil.rmtree, file.parent)
    sources = map(str, sorted((ROOT / "model/native").glob("*.cpp")))
    options = f"-O2 -std=c++17 -w -fPIC -shared -pthread -mavx2 -mfma -mf16c {flags[runs]}".split()
    command = [compiler, *options, "-DRIVULET_MODEL_OF_TILES", *sources, "-o", str(file)]
    subprocess.run(command, check=True, timeout=300)
    return Library(TILES, file)


Guess = Callable[[list[RunningSequence]], Mapping[RunningSequence, tuple[int, ...]]]


class Tiny:
    """A checkpoint, a folder or a .gguf file, loaded once by us and once by transformers in float32."""

    def __init__(self, path: Path, max_model_len: int | None = None, op_set: str = "torch") -> None:
        self.path = path
        self.op_set = op_set
        checkpoint = open_checkpoint(path)
        self.config = checkpoint.config
        length = max_model_len or self.config.max_position_embeddings
        self.model: Transformer = loader.load_model(checkpoint, make_ops(op_set), length)
        source = {} if path.is_dir() else {"gguf_file": path.name}
        plainly = {"attn_implementation": "eager", "experts_implementation": "eager"}
        self.reference = AutoModelForCausalLM.from_pretrained(
            path if path.is_dir() else path.parent, dtype=torch.float32, **plainly, **source
        ).eval()

    @torch.no_grad()
    def reference_logits(self, token_ids: Sequence[int]) -> Tensor:
        """One full forward of transformers without a cache: [tokens, vocabulary]."""
        logits: Tensor = self.reference(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
        return logits.float()

    def drive(self, **options: object) -> "Drive":
        """A fresh scheduler, pool and cache over the loaded weights."""
        return Drive(self.model, **options)


@dataclass
class Trace:
    """What one request got."""

    logits: list[Tensor] = field(default_factory=list)
    """The logits that each of its output tokens was chosen from."""
    outputs: list[TokenOutput] = field(default_factory=list)
    tolerance: float = 0.0
    """How far the logits may be from those of another run of the same tokens."""

    @property
    def tokens(self) -> list[int]:
        """Its output."""
        return [output.token.id for output in self.outputs if output.token is not None]

    @property
    def done(self) -> bool:
        """Whether its terminal output came."""
        return bool(self.outputs) and self.outputs[-1].finish_reason is not None


class Drive:
    """Scheduler and runner by hand; checks every invariant after each step.

    `blocks` are those of each cache group, all alike or one by one. `poison` fills each free block with a
    value before each step, so that whoever reads one is seen.
    `forced` gives the output tokens of a request instead of the sampler. `guess` is asked before each step
    what follows the sequences that decode; there is room for so many `guesses`.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        blocks: int | Sequence[int] = 256,
        budget: int = 512,
        max_running: int = 64,
        prefix_cache: bool = True,
        poison: float | None = None,
        shuffle_blocks: int | None = None,
        guesses: int = 0,
    ) -> None:
        groups = model.config.cache_groups
        counts = [blocks] * len(groups) if isinstance(blocks, int) else blocks
        self.runner = make_runner(model, counts, budget, max_running, guesses)
        self.cache = self.runner.graph.cache
        self.pools = [
            BlockPool(count, self.cache.block_size, window=group.window, prefix_cache=prefix_cache)
            for group, count in zip(groups, counts, strict=True)
        ]
        self.pool = self.pools[0]
        for index, pool in enumerate(self.pools):
            count = pool.num_blocks
            self.cache.fill(range(count), float("nan") if poison is None else poison, index)
            if shuffle_blocks is not None:
                generator = torch.Generator().manual_seed(shuffle_blocks + index)
                pool._free = type(pool._free).fromkeys(torch.randperm(count, generator=generator).tolist())
        self.scheduler = Scheduler(*self.pools, token_budget=budget, max_running=max_running)
        # On the native kernels a row is the same to the last bit. Torch rounds matrix products of other
        # shapes differently; wrong keys, positions or masks move these logits by more than 0.1.
        self.tolerance = 0.0 if isinstance(model.ops, NativeOps) else 2e-4
        self.poison = poison
        self.traces: dict[str, Trace] = {}
        self.forced: dict[str, Sequence[int]] = {}
        self.batches: list[Batch] = []
        self.guess: Guess = lambda decoding: {}

    def add(
        self,
        name: str,
        prompt: Sequence[int],
        max_tokens: int = 8,
        forced: Sequence[int] | None = None,
        params: SamplingParams | None = None,
        eos_ids: Sequence[int] = (),
        **more: object,
    ) -> Trace:
        """Queue a request; `more` are further fields of Request."""
        self.traces[name] = Trace(tolerance=self.tolerance)
        if forced is not None:
            self.forced[name] = forced
            max_tokens = len(forced)
        params = params or SamplingParams()
        self.scheduler.add(Request(name, tuple(prompt), params, max_tokens, frozenset(eos_ids), **more))
        return self.traces[name]

    def step(self) -> bool:
        """One step; gives whether there was anything to do."""
        batch = self.scheduler.schedule(guesses=self.guess(self.scheduler.decoding))
        self.scheduler.check()
        if batch is None:
            return False
        assert batch.num_tokens <= self.scheduler.token_budget
        self.batches.append(batch)
        if self.poison is not None:
            for index, pool in enumerate(self.pools):
                free = [block for block in pool._free if pool._blocks[block].key is None]
                self.cache.fill(free, self.poison, index)
        result = self._execute(batch)
        for name, output in self.scheduler.update(batch, result):
            assert not self.traces[name].done, "an output after the terminal one"
            self.traces[name].outputs.append(output)
        self.scheduler.check()
        return True

    def run(self, most_steps: int = 10_000) -> "Drive":
        """Step until idle."""
        for _ in range(most_steps):
            if not self.step():
                assert self.scheduler.tables.num_used == 0
                return self
        raise AssertionError("it does not end")

    def _execute(self, batch: Batch) -> StepResult:
        names = [c.request_id for c in batch.chunks if c.samples for _ in range(c.guesses + 1)]
        sampler = self.runner.sampler
        original: Callable[[Scores, Sequence[Row]], list[Token]] = sampler.sample

        def recording(scores: Scores, rows: Sequence[Row]) -> list[Token]:
            tokens = original(scores, rows)
            for place, (name, row) in enumerate(zip(names, rows, strict=True)):
                # Those of guesses that do not come true are overwritten when their places are reached again.
                self.traces[name].logits[row.num_output :] = [scores.logits[place].clone()]
                if name in self.forced:
                    tokens[place] = Token(self.forced[name][row.num_output])
            return tokens

        sampler.sample = recording  # type: ignore[method-assign]
        try:
            return self.runner.execute(batch)
        finally:
            sampler.sample = original  # type: ignore[method-assign]

"""One pass through the model, ready to be repeated: run as it is, or captured once and replayed.

A graph holds the model and its cache, takes a Batch, gives the scores of the rows that are wanted, and keeps
the rows of its last pass if it is told to, so that those of others can be had later.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.batch import Batch
from model.kv_cache import KVCache
from model.ops.native import NativeOps, Replay
from model.ops.native_pass import Pass
from model.ops.reference import TorchOps
from model.ops.sampling import SamplingOps, Scores, TorchSampling
from model.transformer import Transformer


class Graph(Protocol):
    """What the runner replays."""

    model: Transformer
    cache: KVCache

    @property
    def sampling(self) -> SamplingOps:
        """What chooses tokens from the logits."""

    def run(self, batch: Batch, rows: Sequence[int] = (), *, keeps: bool = True) -> Scores:
        """Compute a batch's rows, in the order of its chunks; keys and values go into the cache.

        Gives the scores of some of the rows, valid until the next call. Those of others can be had later
        only if it `keeps` them.
        """

    def scores(self, rows: Sequence[int]) -> Scores:
        """Those of other rows of the last pass; valid until the next call."""


def make_graph(model: Transformer, cache: KVCache, max_rows: int, max_selected: int) -> Graph:
    """The graph for the model's op set; its buffers are sized once, for the largest pass."""
    if isinstance(model.ops, NativeOps):
        return TapeGraph(model, model.ops, cache, max_rows, max_selected)
    assert isinstance(model.ops, TorchOps)
    return EagerGraph(model, model.ops, cache)


class EagerGraph:
    """Runs the model's Python at each step: the torch ops on any device."""

    def __init__(self, model: Transformer, ops: TorchOps, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.sampling: SamplingOps = TorchSampling()
        self._ops = ops
        self._hidden = torch.empty(0)

    @torch.inference_mode()
    def run(self, batch: Batch, rows: Sequence[int] = (), *, keeps: bool = True) -> Scores:
        """Lay the batch out as tensors and run the forward."""
        config = self.model.config
        windows = [group.window for group in config.cache_groups]
        inputs = self._ops.prepare(batch, config.num_heads, config.num_kv_heads, windows)
        self._hidden = self.model.forward(self.cache, inputs)  # [rows, hidden]
        return self.scores(rows)

    @torch.inference_mode()
    def scores(self, rows: Sequence[int]) -> Scores:
        """Project the selected rows."""
        logits: Tensor = self.model.logits(self._hidden, list(rows))
        return self.sampling.summarise(logits)


class TapeGraph:
    """Records the model's Python once, then replays a tape of native work: one call a pass."""

    def __init__(
        self, model: Transformer, ops: NativeOps, cache: KVCache, max_rows: int, max_selected: int
    ) -> None:
        self.model = model
        self.cache = cache
        self.sampling: SamplingOps = ops.sampling
        self._max_rows, self._max_selected = max_rows, max_selected
        with ops.recording(max_rows, max_selected) as whole:
            hidden = model.forward(cache, None)
            self._scores = ops.summarise(model.logits(hidden, None))  # of the most that may be selected
        with ops.recording(max_rows, max_selected, after=whole) as head:
            ops.summarise(model.logits(hidden, None))
        self._whole, self._head = whole, head
        self._pass = Pass.empty()

    def run(self, batch: Batch, rows: Sequence[int] = (), *, keeps: bool = True) -> Scores:
        """Fill the pass and replay all of it: the one native call of a step."""
        assert batch.num_tokens <= self._max_rows
        self._pass = Pass.of(batch, rows, narrows=not keeps)
        return self._replay(self._whole, self._pass, len(rows))

    def scores(self, rows: Sequence[int]) -> Scores:
        """Replay the head on other rows."""
        assert not self._pass.struct.narrows
        return self._replay(self._head, self._pass.select(rows), len(rows))

    def _replay(self, tape: Replay, given: Pass, selected: int) -> Scores:
        assert selected <= self._max_selected
        tape.run(given)
        return self._scores.first(selected)

"""One pass through the model, ready to be repeated: run as it is, or captured once and replayed.

A graph holds the model and its cache, takes a Batch, and keeps the rows of its last pass, from which
logits can be had for any of them.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch
from model.kv_cache import KVCache
from model.ops.native import NativeOps
from model.ops.native_pass import Pass
from model.ops.reference import TorchOps
from model.ops.sampling import SamplingOps, TorchSampling
from model.transformer import Transformer


class Graph(Protocol):
    """What the runner replays."""

    model: Transformer
    cache: KVCache

    @property
    def sampling(self) -> SamplingOps:
        """What chooses tokens from the logits."""

    def run(self, batch: Batch) -> None:
        """Compute a batch's rows, in the order of its chunks; keys and values go into the cache."""

    def logits(self, rows: Sequence[int]) -> Tensor:
        """[rows, vocabulary] in float32, of rows of the last pass; valid until the next call."""


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

    def run(self, batch: Batch) -> None:
        """Lay the batch out as tensors and run the forward."""
        config = self.model.config
        windows = [group.window for group in config.cache_groups]
        inputs = self._ops.prepare(batch, config.num_heads, config.num_kv_heads, windows)
        self._hidden = self.model.forward(self.cache, inputs)  # [rows, hidden]

    def logits(self, rows: Sequence[int]) -> Tensor:
        """Project the selected rows."""
        logits: Tensor = self.model.logits(self._hidden, list(rows))
        return logits


class TapeGraph:
    """Records the model's Python once, then replays a tape of native work: one call a pass."""

    def __init__(
        self, model: Transformer, ops: NativeOps, cache: KVCache, max_rows: int, max_selected: int
    ) -> None:
        self.model = model
        self.cache = cache
        self.sampling: SamplingOps = ops.sampling
        self._max_rows, self._max_selected = max_rows, max_selected
        with ops.recording(max_rows, max_selected) as forward:
            hidden = model.forward(cache, None)
        with ops.recording(max_rows, max_selected) as head:
            self._logits: Tensor = model.logits(hidden, None)  # [most selected, vocabulary]
        self._forward, self._head = forward, head
        self._pass = Pass.empty()

    def run(self, batch: Batch) -> None:
        """Fill the pass and replay the forward."""
        assert batch.num_tokens <= self._max_rows
        self._pass = Pass.of(batch)
        self._forward.run(self._pass)

    def logits(self, rows: Sequence[int]) -> Tensor:
        """Replay the head on the selected rows."""
        assert len(rows) <= self._max_selected
        self._head.run(self._pass.select(np.asarray(rows, dtype=np.int32)))
        return self._logits[: len(rows)]

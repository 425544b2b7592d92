"""Executes a Batch: tensors in, one pass through the model, sampled tokens and scores out.

The only place where plain Python becomes tensors and back; it holds the model and the cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.batch import Batch, Chunk, ChunkResult, StepResult, Token
from model.kv_cache import KVCache
from model.sampler import Row, sample, score
from model.transformer import Transformer

SCORED_ROWS = 64
"""Prompt rows scored at a time: their logits over the vocabulary never exist all at once."""


class Runner:
    """One resident model with its cache."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model = model
        self.cache = cache

    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepResult:
        """Compute one step; the results stand in the order of the batch's chunks."""
        config = self.model.config
        inputs = self.model.ops.prepare(batch, config.num_heads, config.num_kv_heads)
        hidden = self.model.forward(self.cache, inputs)  # [rows, hidden]
        next_tokens = iter(self._sample(batch, hidden))
        prompt_tokens = self._score(batch, hidden)
        return StepResult(
            tuple(
                ChunkResult(next(next_tokens) if chunk.samples else None, scored)
                for chunk, scored in zip(batch.chunks, prompt_tokens, strict=True)
            )
        )

    def _sample(self, batch: Batch, hidden: Tensor) -> list[Token]:
        """One token for each chunk that reaches its sequence's end, from the chunk's last row."""
        last_rows, rows, end = [], [], 0
        for chunk in batch.chunks:
            end += chunk.count
            if chunk.samples:
                last_rows.append(end - 1)
                rows.append(Row(chunk.params, chunk.token_ids, chunk.prompt_length))
        if not rows:
            return []
        return sample(self.model.logits(hidden[last_rows]), rows)

    def _score(self, batch: Batch, hidden: Tensor) -> list[tuple[Token, ...]]:
        """The log-probability of each prompt token that the chunks' rows predict, where asked for."""
        scored, row = [], 0
        for chunk in batch.chunks:
            rows = hidden[row : row + chunk.count]
            scored.append(() if chunk.params.prompt_logprobs is None else self._score_chunk(chunk, rows))
            row += chunk.count
        return scored

    def _score_chunk(self, chunk: Chunk, hidden: Tensor) -> tuple[Token, ...]:
        targets: Sequence[int] = chunk.token_ids[chunk.start + 1 : min(chunk.stop + 1, chunk.prompt_length)]
        tokens: list[Token] = []
        for start in range(0, len(targets), SCORED_ROWS):
            part = targets[start : start + SCORED_ROWS]
            logits = self.model.logits(hidden[start : start + len(part)])
            tokens.extend(score(logits, part, [chunk.params.prompt_logprobs or 0] * len(part)))
        return tuple(tokens)

"""Executes a Batch: tensors in, one pass through the model, sampled tokens and scores out.

The only place where plain Python becomes tensors and back; the graph holds model and cache.
"""

from collections.abc import Sequence

import torch

from model.batch import Batch, Chunk, ChunkResult, StepResult, Token
from model.graph import Graph
from model.sampler import Row, Sampler

SCORED_ROWS = 64
"""Prompt rows scored at a time: their logits over the vocabulary never exist all at once."""


class Runner:
    """One resident model with its cache."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.sampler = Sampler(graph.sampling)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepResult:
        """Compute one step; the results stand in the order of the batch's chunks."""
        self.graph.run(batch)
        next_tokens = iter(self._sample(batch))
        prompt_tokens = self._score(batch)
        return StepResult(
            tuple(
                ChunkResult(next(next_tokens) if chunk.samples else None, scored)
                for chunk, scored in zip(batch.chunks, prompt_tokens, strict=True)
            )
        )

    def _sample(self, batch: Batch) -> list[Token]:
        """One token for each chunk that reaches its sequence's end, from the chunk's last row."""
        last_rows, rows, end = [], [], 0
        for chunk in batch.chunks:
            end += chunk.count
            if chunk.samples:
                last_rows.append(end - 1)
                rows.append(Row(chunk.params, chunk.token_ids, chunk.prompt_length))
        return self.sampler.sample(self.graph.logits(last_rows), rows) if rows else []

    def _score(self, batch: Batch) -> list[tuple[Token, ...]]:
        """The log-probability of each prompt token that the chunks' rows predict, where asked for."""
        scored, row = [], 0
        for chunk in batch.chunks:
            scored.append(() if chunk.params.prompt_logprobs is None else self._score_chunk(chunk, row))
            row += chunk.count
        return scored

    def _score_chunk(self, chunk: Chunk, first_row: int) -> tuple[Token, ...]:
        targets: Sequence[int] = chunk.token_ids[chunk.start + 1 : min(chunk.stop + 1, chunk.prompt_length)]
        tokens: list[Token] = []
        for start in range(0, len(targets), SCORED_ROWS):
            part = targets[start : start + SCORED_ROWS]
            logits = self.graph.logits(range(first_row + start, first_row + start + len(part)))
            tokens.extend(self.sampler.score(logits, part, [chunk.params.prompt_logprobs or 0] * len(part)))
        return tuple(tokens)

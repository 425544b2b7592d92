"""Executes a Batch: tensors in, one pass through the model, sampled tokens and scores out.

The only place where plain Python becomes tensors and back; the graph holds model and cache.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice

import numpy as np
import torch

from model.batch import Batch, Chunk, ChunkResult, Constraint, StepResult, Token
from model.errors import OutOfMemory
from model.graph import Graph
from model.ops.sampling import Scores
from model.prefault import Prefault
from model.sampler import Row, Sampler

logger = logging.getLogger("rivulet.runner")

MASK_FAILED = "the grammar could not be followed any further"
NOTHING_ALLOWED = "the grammar allows no token to come next"

MASK_THREADS = 2

SCORED_ROWS = 64
"""Prompt rows scored at a time: their logits over the vocabulary never exist all at once."""


NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "_ALLOC_FAILED")
"""What those of torch's RuntimeErrors say that are no torch.OutOfMemoryError: a CPU's, CUDA's, cuBLAS's."""


class Runner:
    """One resident model with its cache."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.sampler = Sampler(graph.sampling)
        self._prefault = Prefault(graph.cache)
        # Masks are made while the model computes; the threads start with the first of them.
        self._masks = ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="rivulet-mask")

    def execute(self, batch: Batch) -> StepResult:
        """Compute one step; the results stand in the order of the batch's chunks.

        OutOfMemory if it takes more than there is. Whatever it raises, the same batch, or a part of it with
        the copies into its blocks, may be executed again.
        """
        try:
            return self._execute(batch)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise OutOfMemory(str(error)) from None
        except RuntimeError as error:
            if not any(sign in str(error) for sign in NO_MEMORY):
                raise
            raise OutOfMemory(str(error)) from None

    def _execute(self, batch: Batch) -> StepResult:
        self._prefault.look(batch)
        masks = {
            chunk.request_id: self._masks.submit(self._allowed, chunk.constraint)
            for chunk in batch.chunks
            if chunk.samples and chunk.constraint is not None
        }
        try:
            if batch.copies:
                self.graph.cache.copy(batch.copies)
            keeps = any(chunk.params.prompt_logprobs is not None for chunk in batch.chunks)
            scores = self.graph.run(batch, _choosing(batch), keeps=keeps)
        finally:
            if masks:
                wait(masks.values())  # a step that is tried again must not find a constraint in use
        allowed, errors = _join(masks)
        chosen = iter(self._sample(batch, scores, allowed))
        prompt_tokens = self._score(batch)
        results = []
        for chunk, scored in zip(batch.chunks, prompt_tokens, strict=True):
            tokens, error = next(chosen) if chunk.samples else (), errors.get(chunk.request_id)
            results.append(ChunkResult(() if error else tokens, scored, error))
        return StepResult(tuple(results))

    def _allowed(self, constraint: Constraint) -> np.ndarray:
        """Which tokens may come: bool [vocabulary]."""
        size = self.graph.model.config.vocab_size
        mask = np.frombuffer(constraint.mask(), np.uint8)
        bits = np.zeros(size, np.bool_)
        known = np.unpackbits(mask, bitorder="little")[:size]
        bits[: len(known)] = known
        return bits

    def _sample(
        self, batch: Batch, scores: Scores, allowed: Mapping[str, np.ndarray]
    ) -> list[tuple[Token, ...]]:
        """What follows each chunk that reaches its sequence's end: from its last row, and those of guesses.

        A token depends on nothing but its row's logits, its history and its place in the output, so the
        tokens are the very ones that come without guesses, one a step.
        """
        sampling = [chunk for chunk in batch.chunks if chunk.samples]
        if not sampling:
            return []
        rows = [
            Row(chunk.params, chunk.token_ids, chunk.prompt_length, allowed.get(chunk.request_id), ahead)
            for chunk in sampling
            for ahead in range(chunk.guesses, -1, -1)
        ]
        tokens = iter(self.sampler.sample(scores, rows))
        return [_come_true(chunk, tuple(islice(tokens, chunk.guesses + 1))) for chunk in sampling]

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
            scores = self.graph.scores(range(first_row + start, first_row + start + len(part)))
            tokens.extend(self.sampler.score(scores, part, [chunk.params.prompt_logprobs or 0] * len(part)))
        return tuple(tokens)


def _choosing(batch: Batch) -> list[int]:
    """The rows that tokens are chosen from: the last of each chunk that samples, and those of its guesses."""
    rows: list[int] = []
    end = 0
    for chunk in batch.chunks:
        end += chunk.count
        if chunk.samples:
            rows += range(end - 1 - chunk.guesses, end)
    return rows


def _come_true(chunk: Chunk, chosen: tuple[Token, ...]) -> tuple[Token, ...]:
    """The tokens up to the first that is not what was guessed: the rows after it had another history."""
    guesses = chunk.token_ids[chunk.stop - chunk.guesses : chunk.stop]
    wrong = (place for place, guess in enumerate(guesses) if chosen[place].id != guess)
    return chosen[: next(wrong, chunk.guesses) + 1]


def _join(masks: Mapping[str, "Future[np.ndarray]"]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The masks that can be used, and what is to be said of the others; by request."""
    allowed: dict[str, np.ndarray] = {}
    errors: dict[str, str] = {}
    for request_id, future in masks.items():
        try:
            mask = future.result()
        except BaseException as error:  # a panic of llguidance, which is Rust, is no Exception
            logger.warning("the mask of request %s failed: %r", request_id, error)
            errors[request_id] = MASK_FAILED
            continue
        if mask.any():
            allowed[request_id] = mask
        else:
            errors[request_id] = NOTHING_ALLOWED
    return allowed, errors

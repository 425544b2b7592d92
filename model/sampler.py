"""Chooses tokens from logits: penalties, bias, what may not come, the cuts, one draw a row.

A row's token depends on its own logits, parameters, history, seed and output index only; there is
no generator state, so a batch, a preemption or a restart changes nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.batch import SamplingParams, Token
from model.ops.sampling import SamplingOps, Scores, bounded

_MASK = (1 << 64) - 1

FORBIDS = -100.0
"""A logit bias of this and less forbids the token."""


class Row(NamedTuple):
    """What the choice of one row's token depends on, beside its logits."""

    params: SamplingParams
    token_ids: Sequence[int]
    """Prompt and output so far, and what is only guessed to follow them."""
    prompt_length: int
    allowed: np.ndarray | None = None
    """bool [vocabulary]: what the row's constraint lets come, at least one token."""
    guesses: int = 0
    """So many of the last `token_ids` come after the token that is chosen."""

    @property
    def length(self) -> int:
        """Tokens that there are when this one is chosen."""
        return len(self.token_ids) - self.guesses

    @property
    def num_output(self) -> int:
        """The index of the output token that is chosen."""
        return self.length - self.prompt_length

    @property
    def uniform(self) -> float:
        """The row's random number in [0, 1)."""
        return uniform(self.params.seed, self.num_output)

    @property
    def is_plain(self) -> bool:
        """Whether the token is the most likely one by the model's own logits, and nothing else is asked."""
        return self.allowed is None and self.params.is_plain

    @property
    def draws(self) -> bool:
        """Whether the token is drawn; else it is the most likely one."""
        return self.params.temperature > 0 and self.params.top_k != 1

    @property
    def may_not_end(self) -> bool:
        """Whether the output is too short to end."""
        return self.num_output < self.params.min_tokens and bool(self.params.ending_ids)

    @property
    def changes_logits(self) -> bool:
        """Whether the token is chosen from other logits than the model's."""
        params = self.params
        return params.has_penalty or bool(params.logit_bias) or self.may_not_end or self.allowed is not None


def uniform(seed: int, index: int) -> float:
    """The `index`-th random number of a seed: SplitMix64 (Steele, Lea, Flood 2014), 53 bits."""
    state = _mix(seed & _MASK) ^ _mix((seed >> 64 & _MASK) + 1)
    return (_mix((state + (index + 1) * 0x9E3779B97F4A7C15) & _MASK) >> 11) / (1 << 53)


def _mix(z: int) -> int:
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _MASK
    return z ^ z >> 31


class Sampler:
    """Chooses and scores tokens, with a backend for what runs over the vocabulary."""

    def __init__(self, ops: SamplingOps) -> None:
        self._ops = ops

    def sample(self, scores: Scores, rows: Sequence[Row]) -> list[Token]:
        """One token a row; the logits stay as they are."""
        assert len(scores) == len(rows)
        chosen = scores.best if all(row.is_plain for row in rows) else self._choose(scores, rows)
        return self.score(scores, chosen, [row.params.logprobs for row in rows])

    @torch.inference_mode()
    def _choose(self, scores: Scores, rows: Sequence[Row]) -> list[int]:
        """A token a row where that need not be the most likely one."""
        chosen, logits = scores.best, scores.logits
        changed = logits
        if touched := [i for i, row in enumerate(rows) if row.changes_logits]:
            changed = logits.clone()
            for i in touched:
                _penalise(changed[i], rows[i])
                _restrict(changed[i], rows[i])
                if not rows[i].draws:
                    chosen[i] = int(changed[i].argmax())
        random = [i for i, row in enumerate(rows) if row.draws]
        if random:
            some = changed if len(random) == len(rows) else changed[random]
            drawn = self._ops.draw(some, [rows[i].params for i in random], [rows[i].uniform for i in random])
            for i, token in zip(random, drawn.tolist(), strict=True):
                chosen[i] = token
        return chosen

    def score(self, scores: Scores, token_ids: Sequence[int], num_top: Sequence[int | None]) -> list[Token]:
        """Log-probabilities of one token a row and of the row's `num_top` best, of the raw distribution.

        None asks for neither.
        """
        tokens = [Token(id) for id in token_ids]
        if scored := [row for row, count in enumerate(num_top) if count is not None]:
            logprobs = scores.logprobs(scored, [token_ids[row] for row in scored])
            top = _top(scores, {row: count for row in scored if (count := num_top[row])})
            for row, logprob in zip(scored, logprobs, strict=True):
                tokens[row] = Token(token_ids[row], logprob, top.get(row, ()))
        return tokens


@torch.inference_mode()
def _top(scores: Scores, counts: dict[int, int]) -> dict[int, tuple[tuple[int, float], ...]]:
    """By row so many of the most likely tokens with their log-probabilities, best first."""
    if not counts:
        return {}
    logits, rows = scores.logits, list(counts)
    some = logits if len(rows) == len(scores) else logits[rows]
    values, indices = some.topk(min(max(counts.values()), logits.shape[-1]))
    logprobs = values - scores.normaliser[rows][:, None]
    ranked = zip(counts.items(), indices.tolist(), logprobs.tolist(), strict=True)
    return {row: tuple(zip(ids[:count], told[:count], strict=True)) for (row, count), ids, told in ranked}


def _penalise(logits: Tensor, row: Row) -> None:
    """Apply a row's penalties in place: repetition over prompt and output, the others over the output.

    Sources: CTRL (arXiv:1909.05858, 4.1) as in transformers; OpenAI's API reference.
    """
    params = row.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(list(set(row.token_ids[: row.length])), device=logits.device)
        values = logits[seen]
        factor = bounded(params.repetition_penalty)
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    output = row.token_ids[row.prompt_length : row.length]
    if output and (params.frequency_penalty or params.presence_penalty):
        tokens, counts = torch.unique(torch.tensor(output, device=logits.device), return_counts=True)
        logits[tokens] -= counts * params.frequency_penalty + params.presence_penalty


def _restrict(logits: Tensor, row: Row) -> None:
    """Add a row's bias, and make what may not come minus infinity, in place; something stays possible.

    The constraint comes first: what bias and minimum forbid is possible after all if nothing else is.
    """
    params = row.params
    forbidden = [token for token, bias in params.logit_bias if bias <= FORBIDS]
    if added := [(token, bias) for token, bias in params.logit_bias if bias > FORBIDS]:
        tokens, biases = zip(*added, strict=True)
        index = torch.tensor(tokens, device=logits.device)
        logits.index_add_(0, index, torch.tensor(biases, dtype=logits.dtype, device=logits.device))
    if row.may_not_end:
        forbidden += params.ending_ids
    if row.allowed is not None:
        allowed = torch.from_numpy(row.allowed).to(logits.device)
        logits.copy_(torch.where(allowed, logits, -torch.inf))
    if forbidden:
        before = logits[forbidden]
        logits[forbidden] = -torch.inf
        if bool(logits.max() == -torch.inf):
            logits[forbidden] = before

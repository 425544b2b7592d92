"""Chooses tokens from logits: penalties, temperature, top-k, top-p, min-p, one draw a row.

A row's token depends on its own logits, parameters, history, seed and output index only; there is
no generator state, so a batch, a preemption or a restart changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import SamplingParams, Token
from model.ops.sampling import SamplingOps, bounded

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Row:
    """What the choice of one row's token depends on, beside its logits."""

    params: SamplingParams
    token_ids: Sequence[int]
    """Prompt and output so far."""
    prompt_length: int

    @property
    def uniform(self) -> float:
        """The row's random number in [0, 1)."""
        return uniform(self.params.seed, len(self.token_ids) - self.prompt_length)


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

    def sample(self, logits: Tensor, rows: Sequence[Row]) -> list[Token]:
        """[rows, vocabulary] in float32 -> one token a row; the logits stay as they are."""
        assert len(logits) == len(rows)
        best, normaliser = self._ops.summarise(logits)
        changed = logits
        if penalised := [i for i, row in enumerate(rows) if row.params.has_penalty]:
            changed = logits.clone()
            for i in penalised:
                _penalise(changed[i], rows[i])
                best[i] = changed[i].argmax()
        chosen: list[int] = best.tolist()
        random = [i for i, row in enumerate(rows) if row.params.temperature > 0 and row.params.top_k != 1]
        if random:
            some = changed if len(random) == len(rows) else changed[random]
            drawn = self._ops.draw(some, [rows[i].params for i in random], [rows[i].uniform for i in random])
            for i, token in zip(random, drawn.tolist(), strict=True):
                chosen[i] = token
        tokens = [Token(id) for id in chosen]
        if scored := [i for i, row in enumerate(rows) if row.params.logprobs is not None]:
            wanted = [rows[i].params.logprobs or 0 for i in scored]
            some = logits if len(scored) == len(rows) else logits[scored]
            found = _score(some, normaliser[scored], [chosen[i] for i in scored], wanted)
            for i, token in zip(scored, found, strict=True):
                tokens[i] = token
        return tokens

    def score(self, logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[Token]:
        """Log-probabilities of one token a row and of the row's `num_top` best, of the raw distribution."""
        return _score(logits, self._ops.summarise(logits)[1], token_ids, num_top)


def _score(
    logits: Tensor, normaliser: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[Token]:
    picked = logits[torch.arange(len(logits)), torch.tensor(token_ids, device=logits.device)] - normaliser
    most = max(num_top)
    values, indices = logits.topk(min(most, logits.shape[-1])) if most else (logits[:, :0], logits[:, :0])
    ranked = zip((values - normaliser[:, None]).tolist(), indices.tolist(), strict=True)
    return [
        Token(id, logprob, tuple(zip(map(int, ids[:count]), logprobs[:count], strict=True)))
        for id, logprob, (logprobs, ids), count in zip(
            token_ids, picked.tolist(), ranked, num_top, strict=True
        )
    ]


def _penalise(logits: Tensor, row: Row) -> None:
    """Apply a row's penalties in place: repetition over prompt and output, the others over the output.

    Sources: CTRL (arXiv:1909.05858, 4.1) as in transformers; OpenAI's API reference.
    """
    params = row.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(list(set(row.token_ids)), device=logits.device)
        values = logits[seen]
        factor = bounded(params.repetition_penalty)
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    output = row.token_ids[row.prompt_length :]
    if output and (params.frequency_penalty or params.presence_penalty):
        tokens, counts = torch.unique(torch.tensor(output, device=logits.device), return_counts=True)
        logits[tokens] -= counts * params.frequency_penalty + params.presence_penalty

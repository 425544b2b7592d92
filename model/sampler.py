"""Chooses tokens from logits: penalties, temperature, top-k, top-p, min-p, one draw a row.

A row's token depends on its own logits, parameters, history, seed and output index only; there is
no generator state, so a batch, a preemption or a restart changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import SamplingParams, Token

CANDIDATES = 1024
"""Tokens ranked at first; a row whose top-p needs more is sorted whole."""

LEAST, MOST = 1e-6, 1e6
"""What divides or multiplies a logit stays between these: beyond, float32 knows only zero and infinity."""

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


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Token]:
    """[rows, vocabulary] in float32 -> one token a row."""
    assert len(logits) == len(rows)
    penalised = logits
    for index, row in enumerate(rows):
        if row.params.has_penalty:
            if penalised is logits:
                penalised = logits.clone()
            _penalise(penalised[index], row)
    chosen = penalised.argmax(-1)
    random = [index for index, row in enumerate(rows) if row.params.temperature > 0 and row.params.top_k != 1]
    if random:
        chosen[random] = _draw(penalised[random], [rows[index] for index in random])
    ids: list[int] = chosen.tolist()
    tokens = [Token(id) for id in ids]
    scored = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    if scored:
        wanted = [rows[index].params.logprobs or 0 for index in scored]
        for index, token in zip(scored, score(logits[scored], [ids[i] for i in scored], wanted), strict=True):
            tokens[index] = token
    return tokens


def score(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[Token]:
    """Log-probabilities of one token a row and of the row's `num_top` best, of the raw distribution."""
    normaliser = logits.logsumexp(-1)
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
        factor = min(max(params.repetition_penalty, LEAST), MOST)
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    output = row.token_ids[row.prompt_length :]
    if output and (params.frequency_penalty or params.presence_penalty):
        tokens, counts = torch.unique(torch.tensor(output, device=logits.device), return_counts=True)
        logits[tokens] -= counts * params.frequency_penalty + params.presence_penalty


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Sample each row by inversion: [rows, vocabulary] -> [rows].

    Every cut is a threshold on the weight of a token, never a place in a ranking: tokens that tie
    at the threshold stay together, so the outcome cannot depend on how a sort breaks ties.
    """
    params = [row.params for row in rows]
    temperature = _column([min(max(p.temperature, LEAST), MOST) for p in params], logits)
    # The most likely token weighs 1: a tiny temperature does not overflow, and min-p is a weight.
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
    if limited := [i for i, p in enumerate(params) if p.top_k]:
        _drop_below(weights, limited, _top_k_floor(weights[limited], [params[i].top_k for i in limited]))
    if limited := [i for i, p in enumerate(params) if p.top_p < 1]:
        _drop_below(weights, limited, _top_p_floor(weights[limited], [params[i].top_p for i in limited]))
    if limited := [i for i, p in enumerate(params) if p.min_p]:
        _drop_below(weights, limited, _column([params[i].min_p for i in limited], weights))
    return _invert(weights, [row.uniform for row in rows])


def _drop_below(weights: Tensor, rows: list[int], floor: Tensor) -> None:
    """Give no weight to tokens below their row's floor, in place."""
    some = weights[rows]
    weights[rows] = some.masked_fill(some < floor, 0)


def _top_k_floor(weights: Tensor, limits: Sequence[int]) -> Tensor:
    """The weight of the k-th best token: [rows, vocabulary] -> [rows, 1]."""
    limits = [min(k, weights.shape[-1]) for k in limits]
    best = weights.topk(max(limits)).values
    return best.gather(-1, torch.tensor(limits, device=weights.device)[:, None] - 1)


def _top_p_floor(weights: Tensor, top_p: Sequence[float]) -> Tensor:
    """The weight of the last token of the smallest set that reaches p: [rows, vocabulary] -> [rows, 1]."""
    needed = _column(top_p, weights) * weights.sum(-1, keepdim=True)
    best = weights.topk(min(CANDIDATES, weights.shape[-1])).values
    flat = best.sum(-1) < needed.squeeze(-1)
    if best.shape[-1] < weights.shape[-1] and bool(flat.any()):
        # So flat that the candidates do not reach p: these rows, and only these, are sorted whole.
        floor = _last_needed(best, needed)
        floor[flat] = _last_needed(weights[flat].sort(-1, descending=True).values, needed[flat])
        return floor
    return _last_needed(best, needed)


def _last_needed(best: Tensor, needed: Tensor) -> Tensor:
    """The first weight at which the cumulated ones reach what is needed: [rows, n] -> [rows, 1]."""
    place = torch.searchsorted(best.cumsum(-1), needed).clamp_(max=best.shape[-1] - 1)
    return best.gather(-1, place)


def _invert(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """The place at which each row's cumulated weight passes u times its total: [rows, n] -> [rows]."""
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    # Rounding must not lift the threshold to the total: there is no token beyond it.
    threshold = torch.minimum(_column(uniforms, total) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulated, threshold, right=True).squeeze(-1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]

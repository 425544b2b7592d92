"""What sampling asks of a backend: the best token and the normaliser of each row, and draws from rows.

Every cut is a threshold on the weight of a token, never a place in a ranking: tokens that tie at the
threshold stay together, so the outcome cannot depend on how a sort breaks ties.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.batch import SamplingParams

CANDIDATES = 1024
"""Tokens ranked at first; a row whose top-p needs more is sorted whole."""


LEAST, MOST = 1e-6, 1e6


def bounded(factor: float) -> float:
    """What divides or multiplies a logit, kept from where float32 knows only zero and infinity."""
    return min(max(factor, LEAST), MOST)


class SamplingOps(Protocol):
    """Row by row: a row's result does not depend on its neighbours."""

    def summarise(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, vocabulary] -> the best token and the log of the sum of exponentials, [rows] each."""

    def draw(self, logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
        """Draw each row by inversion: temperature, top-k, top-p, min-p, then a number in [0, 1)."""


class TorchSampling:
    """On any device; the reference."""

    def summarise(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """By torch's reductions."""
        return logits.argmax(-1), logits.logsumexp(-1)

    def draw(self, logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
        """[rows, vocabulary] -> [rows]."""
        temperature = _column([bounded(p.temperature) for p in params], logits)
        # The most likely token weighs 1: a tiny temperature does not overflow, and min-p is a weight.
        weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
        if limited := [i for i, p in enumerate(params) if p.top_k]:
            _drop_below(weights, limited, _top_k_floor(weights[limited], [params[i].top_k for i in limited]))
        if limited := [i for i, p in enumerate(params) if p.top_p < 1]:
            _drop_below(weights, limited, _top_p_floor(weights[limited], [params[i].top_p for i in limited]))
        if limited := [i for i, p in enumerate(params) if p.min_p]:
            _drop_below(weights, limited, _column([params[i].min_p for i in limited], weights))
        return _invert(weights, uniforms)


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

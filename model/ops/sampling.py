"""What sampling asks of a backend: the best token and the normaliser of each row, and draws from rows.

Every cut is a threshold on a token's weight, or on its distance from the expected one, never a place in a
ranking: tokens that tie at the threshold stay together, however a sort breaks ties.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from model.batch import SamplingParams

CANDIDATES = 1024
"""Tokens ranked at first; a row whose top-p or typical-p needs more is sorted whole."""


class Scores:
    """Logits of some rows, and what is known of each row.

    Tensors are cut to the rows when they are asked for. A greedy step never asks, and what torch does for
    three cuts would take it longer than all the rest of its sampling.
    """

    __slots__ = ("_best", "_logits", "_normaliser", "_rows")

    def __init__(self, logits: Tensor, best: np.ndarray, normaliser: Tensor, rows: int | None = None) -> None:
        self._logits, self._best, self._normaliser = logits, best, normaliser
        self._rows = len(best) if rows is None else rows

    def __len__(self) -> int:
        return self._rows

    def first(self, rows: int) -> "Scores":
        """Those of the first rows."""
        return Scores(self._logits, self._best, self._normaliser, rows)

    @property
    def best(self) -> list[int]:
        """Each row's most likely token."""
        best: list[int] = self._best[: self._rows].tolist()
        return best

    def logprobs(self, rows: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Of a token in each of these rows, under the model's own distribution."""
        logits: Any = self._logits
        normaliser: Any = self._normaliser
        if logits.is_cpu:  # numpy picks some numbers out in a tenth of the time that torch takes
            logits, normaliser = logits.numpy(), normaliser.numpy()
        logprobs: list[float] = (logits[rows, token_ids] - normaliser[rows]).tolist()
        return logprobs

    @property
    def logits(self) -> Tensor:
        """[rows, vocabulary] in float32."""
        return self._logits[: self._rows]

    @property
    def normaliser(self) -> Tensor:
        """[rows]: the logarithm of the sum of all exponentials."""
        return self._normaliser[: self._rows]


LEAST, MOST = 1e-6, 1e6


def bounded(factor: float) -> float:
    """What divides or multiplies a logit, kept from where float32 knows only zero and infinity."""
    return min(max(factor, LEAST), MOST)


class SamplingOps(Protocol):
    """Row by row: a row's result does not depend on its neighbours."""

    def summarise(self, logits: Tensor) -> Scores:
        """[rows, vocabulary] -> the same with what is known of each row."""

    def draw(self, logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
        """Temperature, top-k, top-p, min-p, typical-p, then a draw by inversion of a number in [0, 1)."""


class TorchSampling:
    """On any device; the reference."""

    def summarise(self, logits: Tensor) -> Scores:
        """By torch's reductions."""
        return Scores(logits, logits.argmax(-1).cpu().numpy(), logits.logsumexp(-1))

    def draw(self, logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
        """[rows, vocabulary] -> [rows]."""
        temperature = _column([bounded(p.temperature) for p in params], logits)
        # The most likely token weighs 1: a tiny temperature does not overflow, and min-p is a weight.
        scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
        weights = scaled.exp()
        if limited := [i for i, p in enumerate(params) if p.top_k]:
            _drop_below(weights, limited, _top_k_floor(weights[limited], [params[i].top_k for i in limited]))
        if limited := [i for i, p in enumerate(params) if p.top_p < 1]:
            some = weights[limited]
            _drop_below(weights, limited, _share_floor(some, some, [params[i].top_p for i in limited]))
        if limited := [i for i, p in enumerate(params) if p.min_p]:
            _drop_below(weights, limited, _column([params[i].min_p for i in limited], weights))
        if limited := [i for i, p in enumerate(params) if p.typical_p < 1]:
            some = weights[limited]
            closeness = _closeness(scaled[limited], some)
            floor = _share_floor(closeness, some, [params[i].typical_p for i in limited])
            weights[limited] = some.masked_fill(closeness < floor, 0)
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


def _closeness(scaled: Tensor, weights: Tensor) -> Tensor:
    """Minus the distance of each token's information from the expected one: [rows, vocabulary], twice.

    With w = exp(x), -log p - H = E[x] - x: the normaliser cancels out (arXiv:2202.00666, 3).
    """
    kept = weights > 0
    moments = torch.where(kept, weights * scaled, 0).sum(-1, keepdim=True, dtype=torch.float64)
    expected = moments / weights.sum(-1, keepdim=True, dtype=torch.float64)
    return torch.where(kept, -(scaled - expected.float()).abs(), -torch.inf)


def _share_floor(scores: Tensor, weights: Tensor, shares: Sequence[float]) -> Tensor:
    """The least score of the smallest set of best tokens that has its share of the weight: -> [rows, 1]."""
    needed = _column(shares, weights) * weights.sum(-1, keepdim=True)
    best = scores.topk(min(CANDIDATES, scores.shape[-1]))
    reached = weights.gather(-1, best.indices).cumsum(-1)
    floor = _first_to_reach(best.values, reached, needed)
    flat = (reached[:, -1:] < needed).squeeze(-1)
    if best.values.shape[-1] < scores.shape[-1] and bool(flat.any()):
        # So flat that the candidates do not have their share: these rows, and only these, are sorted whole.
        order = scores[flat].sort(-1, descending=True)
        reached = weights[flat].gather(-1, order.indices).cumsum(-1)
        floor[flat] = _first_to_reach(order.values, reached, needed[flat])
    return floor


def _first_to_reach(scores: Tensor, reached: Tensor, needed: Tensor) -> Tensor:
    """The score at which the cumulated weights reach what is needed: [rows, n], twice -> [rows, 1]."""
    place = torch.searchsorted(reached, needed).clamp_(max=scores.shape[-1] - 1)
    return scores.gather(-1, place)


def _invert(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """The place at which each row's cumulated weight passes u times its total: [rows, n] -> [rows]."""
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    # Rounding must not lift the threshold to the total: there is no token beyond it.
    threshold = torch.minimum(_column(uniforms, total) * total, total.nextafter(torch.zeros_like(total)))
    place = torch.searchsorted(cumulated, threshold, right=True).squeeze(-1)
    return place.clamp_(max=weights.shape[-1] - 1)  # logits that are no numbers end here: still a token


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]

"""Sampling by the native kernels (native/sampling.h); what it computes is said in sampling.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.batch import SamplingParams
from model.ops import library
from model.ops.library import Library
from model.ops.sampling import Scores, bounded


class NativeSampling:
    """Sampling (see sampling.py) by the crew, a row a task."""

    def __init__(self, lib: Library, crew: library.Crew) -> None:
        self._lib = lib
        self._crew = crew

    def summarise(self, logits: Tensor) -> Scores:
        """By a call of its own; those of a step come with the step (NativeOps.summarise)."""
        rows, size = logits.shape
        best, normaliser = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        self._lib.summarise(
            self._crew.handle,
            logits.data_ptr(),
            logits.stride(0),
            size,
            rows,
            best.data_ptr(),
            normaliser.data_ptr(),
        )
        return Scores(logits, best.numpy(), normaliser)

    def draw(self, logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
        """[rows, vocabulary] -> [rows]."""
        draws = (library.Draw * len(params))(
            *(
                library.Draw(row, p.top_k, bounded(p.temperature), p.top_p, p.min_p, p.typical_p, uniform)
                for row, (p, uniform) in enumerate(zip(params, uniforms, strict=True))
            )
        )
        tokens = torch.empty(len(params), dtype=torch.int64)
        self._lib.sample(
            self._crew.handle,
            logits.data_ptr(),
            logits.stride(0),
            logits.shape[1],
            draws,
            len(params),
            tokens.data_ptr(),
        )
        return tokens

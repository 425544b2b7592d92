"""Every sampler, alone and together, draws from the exact distribution: that of transformers' processors.

Chi-square over a vocabulary of twenty tokens, on each op set; the seeds are fixed, so a test either
always passes or never. That a wrong order and a wrong number are seen is shown as well.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from harness import OP_SETS, make_ops
from test_sampler import chi_square_p
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from model.batch import SamplingParams, Token
from model.ops.native import NativeOps
from model.ops.sampling import TorchSampling
from model.sampler import Row, Sampler

VOCABULARY = 20
LOGITS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(11)) * 1.5
HISTORY = [16, 2, 3, 12, 6, 6, 12, 6]
PROMPT_LENGTH = 3
DRAWS = 4000
LIKELY, UNLIKELY = 1e-3, 1e-6

TRANSFORMERS_ORDER = ("temperature", "top_k", "top_p", "min_p", "typical_p")
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}
OFF = SamplingParams(temperature=1.0)


class Penalties(LogitsProcessor):
    """OpenAI's formula, for which transformers has no processor."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(input_ids[0, PROMPT_LENGTH:], minlength=VOCABULARY)
        fixed = (counts > 0) * self.params.presence_penalty
        return scores - counts * self.params.frequency_penalty - fixed


@pytest.fixture(scope="module", params=OP_SETS)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    ops = make_ops(request.param)
    return Sampler(ops.sampling if isinstance(ops, NativeOps) else TorchSampling())


def sample(sampler: Sampler, logits: Tensor, rows: Sequence[Row]) -> list[Token]:
    return sampler.sample(sampler._ops.summarise(logits), rows)


def expected(
    params: SamplingParams,
    allowed: Sequence[int] | None = None,
    order: Sequence[str] = TRANSFORMERS_ORDER,
    logits: Tensor = LOGITS,
) -> Tensor:
    """The exact distribution; `order` is that of the warpers."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(Penalties(params))
    if added := {(token,): bias for token, bias in params.logit_bias if bias > -100}:
        processors.append(SequenceBiasLogitsProcessor(added))
    if forbidden := [token for token, bias in params.logit_bias if bias <= -100]:
        processors.append(SuppressTokensLogitsProcessor(forbidden))
    if params.min_tokens:
        ending = sorted(params.ending_ids)
        processors.append(MinNewTokensLengthLogitsProcessor(PROMPT_LENGTH, params.min_tokens, ending))
    if allowed is not None:
        processors.append(PrefixConstrainedLogitsProcessor(lambda batch, sentence: list(allowed), 1))
    for name in order:
        if (value := getattr(params, name)) != getattr(OFF, name):
            processors.append(WARPERS[name](value))
    scores: Tensor = processors(torch.tensor([HISTORY]), logits.clone()[None])
    return scores.softmax(-1)[0]


def counts_of(sampler: Sampler, params: SamplingParams, allowed: Sequence[int] | None = None) -> Tensor:
    """How often each token is drawn with so many seeds."""
    mask = None
    if allowed is not None:
        mask = np.zeros(VOCABULARY, np.bool_)
        mask[list(allowed)] = True
    rows = [Row(replace(params, seed=seed), HISTORY, PROMPT_LENGTH, mask) for seed in range(DRAWS)]
    tokens = [token.id for token in sample(sampler, LOGITS.repeat(DRAWS, 1), rows)]
    return torch.bincount(torch.tensor(tokens), minlength=VOCABULARY)


def agreement(counts: Tensor, probabilities: Tensor) -> float:
    """The chance of a deviation at least this large; none if a token without probability was drawn."""
    return 0.0 if bool(counts[probabilities == 0].any()) else chi_square_p(counts, probabilities)


ENDING = frozenset({1, 6})
BIAS = ((4, 2.5), (6, -100.0), (7, -1.5), (11, -250.0), (13, 100.0))
BIASES = ((4, 2.5), (6, -100.0), (7, -1.5), (11, -250.0))
GRAMMAR = (1, 3, 4, 6, 7, 9, 12, 16, 19)

CASES: list[dict[str, object]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.2},
    {"top_p": 0.75},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"min_p": 0.3},
    {"typical_p": 0.05},
    {"typical_p": 0.4},
    {"typical_p": 0.8},
    {"typical_p": 0.97},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.7},
    {"frequency_penalty": 0.7},
    {"presence_penalty": -0.9},
    {"logit_bias": BIASES},
    {"logit_bias": BIAS},
    {"min_tokens": 6, "ending_ids": ENDING},
    {"min_tokens": 5, "ending_ids": ENDING},  # five are there
    {"allowed": GRAMMAR},
    {"allowed": (7,)},
    {"temperature": 0.7, "top_k": 8, "top_p": 0.8},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.3},
    {"temperature": 2.0, "typical_p": 0.6},
    {"temperature": 0.8, "typical_p": 0.5, "top_k": 12},
    {"temperature": 1.3, "top_p": 0.9, "typical_p": 0.7},
    {"temperature": 1.2, "min_p": 0.1, "typical_p": 0.7},
    {"temperature": 1.4, "top_k": 15, "top_p": 0.95, "min_p": 0.03, "typical_p": 0.85},
    {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2},
    {"top_k": 5, "frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 0.8},
    {"logit_bias": BIASES, "repetition_penalty": 1.4, "frequency_penalty": 0.3, "typical_p": 0.8},
    {"allowed": GRAMMAR, "logit_bias": BIASES, "min_tokens": 9, "ending_ids": ENDING, "top_p": 0.9},
    {"allowed": GRAMMAR, "temperature": 1.7, "top_k": 7, "min_p": 0.02, "typical_p": 0.9},
    {
        **{"temperature": 1.5, "top_k": 14, "top_p": 0.97, "min_p": 0.01, "typical_p": 0.93},
        **{"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1},
        **{"logit_bias": BIASES, "min_tokens": 9, "ending_ids": ENDING, "allowed": range(2, 20)},
    },
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_follow_the_exact_distribution(sampler: Sampler, case: dict[str, object]) -> None:
    fields = {"temperature": 1.0, **case}
    allowed = fields.pop("allowed", None)
    params = SamplingParams(**fields)
    counts = counts_of(sampler, params, allowed)
    assert agreement(counts, expected(params, allowed)) > LIKELY, counts


# -- the inverse ------------------------------------------------------------------------------------

ORDERS = {
    "top-p before temperature": ({"temperature": 3.0, "top_p": 0.7}, "top_p temperature"),
    "top-p before top-k": ({"top_k": 6, "top_p": 0.8}, "top_p top_k"),
    "min-p before temperature": ({"temperature": 3.0, "min_p": 0.15}, "min_p temperature"),
    "typical-p before temperature": ({"temperature": 2.0, "typical_p": 0.5}, "typical_p temperature"),
    "typical-p before top-k": ({"top_k": 5, "typical_p": 0.6}, "typical_p top_k"),
    "typical-p before top-p": ({"top_p": 0.7, "typical_p": 0.6}, "typical_p top_p"),
    "typical-p before min-p": ({"min_p": 0.2, "typical_p": 0.6}, "typical_p min_p"),
}

NUMBERS = [
    ({"temperature": 1.0}, {"temperature": 1.2}),
    ({"top_k": 6}, {"top_k": 7}),
    ({"top_p": 0.75}, {"top_p": 0.9}),
    ({"min_p": 0.1}, {"min_p": 0.3}),
    ({"typical_p": 0.8}, {"typical_p": 0.5}),
    ({"typical_p": 0.4}, {"top_p": 0.4}),
    ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.0}),
    ({"frequency_penalty": 0.7}, {"presence_penalty": 0.7}),
    ({"presence_penalty": -0.9}, {"frequency_penalty": -0.9}),
    ({"logit_bias": ((4, 1.0),)}, {"logit_bias": ((5, 1.0),)}),
    ({"logit_bias": ((12, -100.0),)}, {"logit_bias": ((12, -2.0),)}),
    ({"min_tokens": 6, "ending_ids": ENDING}, {}),
    ({"min_tokens": 5, "ending_ids": ENDING}, {"min_tokens": 6, "ending_ids": ENDING}),
    ({"logit_bias": ((3, 2.0),), "repetition_penalty": 3.0}, {"repetition_penalty": 3.0}),
]


@pytest.mark.parametrize("name", ORDERS)
def test_a_wrong_order_is_seen(sampler: Sampler, name: str) -> None:
    fields, order = ORDERS[name]
    params = SamplingParams(**{"temperature": 1.0, **fields})
    counts = counts_of(sampler, params)
    assert agreement(counts, expected(params)) > LIKELY
    assert agreement(counts, expected(params, order=order.split())) < UNLIKELY


@pytest.mark.parametrize(("right", "wrong"), NUMBERS, ids=str)
def test_a_wrong_number_is_seen(sampler: Sampler, right: dict[str, object], wrong: dict[str, object]) -> None:
    counts = counts_of(sampler, SamplingParams(**{"temperature": 1.0, **right}))
    other = SamplingParams(**{"temperature": 1.0, **wrong})
    assert agreement(counts, expected(other)) < UNLIKELY


# -- what a cut keeps, token by token ----------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 5.0])
@pytest.mark.parametrize("size", [7, 260, 5000])
def test_typical_draws_the_token_that_transformers_would(sampler: Sampler, size: int, scale: float) -> None:
    """For each number the same token, but for rounding; flat ones, too, which need more than 1,024 tokens."""
    exact = torch.randn(size, generator=torch.Generator().manual_seed(size)) * scale
    for logits in (exact, (exact * 8).round() / 8):  # many ties
        for typical_p in (0.031, 0.513, 0.937):
            rows = [Row(SamplingParams(1.0, typical_p=typical_p, seed=seed), [0], 1) for seed in range(200)]
            tokens = torch.tensor([token.id for token in sample(sampler, logits.repeat(200, 1), rows)])
            cumulated = TypicalLogitsWarper(typical_p)(None, logits.double()[None])[0].softmax(-1).cumsum(-1)
            uniforms = torch.tensor([row.uniform for row in rows], dtype=torch.float64)
            want = torch.searchsorted(cumulated, uniforms, right=True)
            assert float((tokens == want).float().mean()) >= 0.98, (typical_p, tokens, want)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 5.0])
@pytest.mark.parametrize("size", [7, 260, 5000, 40_001])
@pytest.mark.parametrize(
    "cuts",
    [
        {},
        {"top_k": 40},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"min_p": 0.2},
        {"top_k": 300, "top_p": 0.8},
        {"top_k": 2000, "top_p": 0.99, "min_p": 0.001},
    ],
    ids=str,
)
def test_cuts_draw_the_token_that_transformers_would(
    sampler: Sampler, cuts: dict[str, Any], size: int, scale: float
) -> None:
    """For each number the token at its place, but for rounding, whatever of the vocabulary is left."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * scale
    logits[::3] += 2 * scale
    rows = [Row(SamplingParams(1.0, **cuts, seed=seed), [0], 1) for seed in range(100)]
    tokens = torch.tensor([token.id for token in sample(sampler, logits.expand(100, size), rows)])
    scores = logits.double()[None]
    for name, value in cuts.items():
        if scale or name == "min_p":  # equal tokens stay together here, and are told apart there
            scores = WARPERS[name](value)(None, scores)
    probabilities = scores[0].softmax(-1)
    above = probabilities.cumsum(-1)[tokens]
    below = above - probabilities[tokens]
    uniforms = torch.tensor([row.uniform for row in rows], dtype=torch.float64)
    assert bool(((below - 1e-3 < uniforms) & (uniforms < above + 1e-3)).all()), (tokens, below, uniforms)
    assert float((probabilities[tokens] > 0).float().mean()) >= 0.98, "what was cut came"


@pytest.mark.parametrize("size", [20, 5000])
def test_top_k_of_fewer_tokens_than_can_come(sampler: Sampler, size: int) -> None:
    """What a constraint leaves is fewer than k: all of it may come, whoever was drawn for before."""
    allowed = np.zeros(size, np.bool_)
    allowed[[3, 11, 17]] = True
    logits = torch.zeros(size)
    logits[3], logits[11], logits[17] = 0.0, -2.0, -4.0
    params = SamplingParams(1.0, top_k=50)
    crowd = [Row(replace(params, seed=seed), [0], 1) for seed in range(32)]
    sample(sampler, torch.zeros(32, size), crowd)
    rows = [Row(replace(params, seed=seed), [0], 1, allowed) for seed in range(DRAWS)]
    tokens = [
        token.id
        for start in range(0, DRAWS, 500)
        for token in sample(sampler, logits.repeat(500, 1), rows[start : start + 500])
    ]
    weights = torch.full((size,), -torch.inf)
    weights[allowed] = logits[allowed]
    assert agreement(torch.bincount(torch.tensor(tokens), minlength=size), weights.softmax(-1)) > LIKELY


def test_typical_ties_stay_together(sampler: Sampler) -> None:
    """Three tokens are equally far from the expectation; the share ends within them."""
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, -4.0])
    rows = [Row(SamplingParams(1.0, typical_p=0.8, seed=seed), [0], 1) for seed in range(500)]
    tokens = {token.id for token in sample(sampler, logits.repeat(500, 1), rows)}
    assert tokens == {0, 1, 2, 3}


def test_every_field_has_a_case() -> None:
    """A parameter that is new must appear among the cases above."""
    known = {name for case in CASES for name in case} | {"seed", "logprobs", "prompt_logprobs"}
    assert {one.name for one in fields(OFF) if one.init} == known - {"allowed"}

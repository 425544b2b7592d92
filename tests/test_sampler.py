"""Sampling: cuts, ties, penalties, what may not come, and that a row's token depends on nothing but the row.

That the distributions are exact is in test_sampling_distributions.py.
"""

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from harness import OP_SETS, make_ops
from torch import Tensor
from transformers import TopPLogitsWarper

from model import sampler
from model.batch import SamplingParams, Token
from model.ops.native import NativeOps
from model.ops.sampling import CANDIDATES, SamplingOps, TorchSampling
from model.sampler import Row, Sampler

LOGITS = torch.tensor([1.3, -0.4, 0.9, 2.1, -1.7])
HISTORY = [0, 2, 3, 3]
PROMPT_LENGTH = 1

BACKEND = Sampler(TorchSampling())


@pytest.fixture(autouse=True, params=OP_SETS)
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs on each op set's own sampling."""
    ops = make_ops(request.param)
    sampling: SamplingOps = ops.sampling if isinstance(ops, NativeOps) else TorchSampling()
    monkeypatch.setattr(sys.modules[__name__], "BACKEND", Sampler(sampling))


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Token]:
    return BACKEND.sample(BACKEND._ops.summarise(logits), rows)


def draw(
    params: SamplingParams, count: int, logits: Tensor = LOGITS, history: Sequence[int] = HISTORY
) -> Tensor:
    """One token for each of `count` seeds."""
    rows = [Row(replace(params, seed=seed), history, PROMPT_LENGTH) for seed in range(count)]
    return torch.tensor([token.id for token in sample(logits.expand(count, -1).clone(), rows)])


def chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    """The chance of a deviation at least this large (Wilson and Hilferty's approximation)."""
    kept = probabilities > 0
    assert int(counts[~kept].sum()) == 0, "a token without probability was drawn"
    wanted = probabilities[kept] * counts.sum()
    freedom = int(kept.sum()) - 1
    if freedom == 0:
        return 1.0
    statistic = float(((counts[kept] - wanted) ** 2 / wanted).sum())
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_a_large_vocabulary_keeps_exactly_the_nucleus(top_p: float, scale: float) -> None:
    """Flat ones, too, which need more than the first candidates."""
    logits = torch.randn(5 * CANDIDATES, generator=torch.Generator().manual_seed(1)) * scale
    params = SamplingParams(temperature=1.0, top_p=top_p)
    allowed = TopPLogitsWarper(top_p)(None, logits[None])[0] > -torch.inf
    tokens = draw(params, 3000, logits)
    assert bool(allowed[tokens].all())
    # The least likely tokens of the nucleus are drawn as well.
    order = logits.masked_fill(~allowed, -torch.inf).argsort(descending=True)[: int(allowed.sum())]
    rank = torch.empty(len(logits), dtype=torch.long)
    rank[order] = torch.arange(len(order))
    assert int(rank[tokens].max()) >= 0.5 * len(order)


def test_ties_stay_together() -> None:
    logits = torch.tensor([2.0, 2.0, 2.0, 1.0, 0.0])
    assert set(draw(SamplingParams(temperature=1.0, top_k=2), 500, logits, [0]).tolist()) == {0, 1, 2}
    assert set(draw(SamplingParams(temperature=1.0, top_p=0.3), 500, logits, [0]).tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    "params", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}], ids=str
)
def test_limits_that_mean_greedy(params: dict[str, float]) -> None:
    best = int(LOGITS.argmax())
    assert set(draw(SamplingParams(**{"temperature": 1.0, **params}), 200).tolist()) == {best}
    assert sample(LOGITS[None], [Row(SamplingParams(), HISTORY, PROMPT_LENGTH)])[0].id == best


@pytest.mark.parametrize(
    ("params", "is_plain"),
    [
        ({}, True),
        ({"temperature": 1.0, "top_k": 1}, True),
        ({"min_tokens": 2}, True),  # of what would end it there is nothing
        ({"prompt_logprobs": 0}, True),  # the prompt's are asked for elsewhere
        ({"temperature": 1.0}, False),
        ({"temperature": 1.0, "top_k": 2}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"logit_bias": ((1, 1.0),)}, False),
        ({"min_tokens": 2, "ending_ids": frozenset({1})}, False),
        ({"logprobs": 2}, True),  # told of whatever is chosen
    ],
)
def test_plain_rows(params: dict[str, Any], is_plain: bool) -> None:
    """Where more is asked than the most likely token, the short way is closed; else both agree."""
    row = Row(SamplingParams(**params), HISTORY, PROMPT_LENGTH)
    assert row.is_plain is is_plain
    assert not row._replace(allowed=numpy.ones(LOGITS.shape[-1], numpy.bool_)).is_plain
    if is_plain:
        scores = BACKEND._ops.summarise(LOGITS[None])
        assert [token.id for token in BACKEND.sample(scores, [row])] == BACKEND._choose(scores, [row])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    random_numbers = random.Random(3)
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(40, 3000, generator=generator).bfloat16().float()  # many ties
    rows = [
        Row(
            SamplingParams(
                temperature=random_numbers.choice([0.0, 0.3, 1.0, 2.0]),
                top_k=random_numbers.choice([0, 1, 5, 50, 2000]),
                top_p=random_numbers.choice([1.0, 0.5, 0.95, 0.99]),
                min_p=random_numbers.choice([0.0, 0.1]),
                typical_p=random_numbers.choice([1.0, 0.3, 0.9]),
                logit_bias=random_numbers.choice([(), ((7, 3.5), (8, -100.0))]),
                min_tokens=random_numbers.choice([0, 40]),
                ending_ids=frozenset({1, 2}),
                repetition_penalty=random_numbers.choice([1.0, 1.3]),
                frequency_penalty=random_numbers.choice([0.0, 0.5]),
                presence_penalty=random_numbers.choice([0.0, -0.5]),
                seed=random_numbers.randrange(1 << 64),
                logprobs=random_numbers.choice([None, 0, 5]),
            ),
            [random_numbers.randrange(3000) for _ in range(30)],
            random_numbers.randrange(1, 30),
            random_numbers.choice([None, numpy.random.default_rng(5).random(3000) < 0.5]),
        )
        for _ in range(40)
    ]
    before = logits.clone()
    together = sample(logits, rows)
    assert torch.equal(logits, before), "sampling must not change the logits"
    for index, row in enumerate(rows):
        (alone,) = sample(logits[index : index + 1], [row])
        assert alone.id == together[index].id
        assert alone.logprob == pytest.approx(together[index].logprob, abs=1e-5)
        assert [i for i, _ in alone.top] == [i for i, _ in together[index].top]


def test_penalties_use_their_own_history_only() -> None:
    """Frequency and presence look at the output, repetition at the prompt too."""
    logits = torch.zeros(3, 5)
    greedy = [
        Row(SamplingParams(frequency_penalty=1.0), [4, 0, 0, 1], 1),
        Row(SamplingParams(presence_penalty=1.0), [0, 1, 2, 3], 4),
        Row(SamplingParams(repetition_penalty=2.0), [0, 1, 2, 3], 2),
    ]
    logits[:, 0], logits[:, 1], logits[:, 4] = 1.9, 1.5, 1.2
    assert [token.id for token in sample(logits, greedy)] == [4, 0, 4]


# -- what may not come --------------------------------------------------------------------------------


def choose(*, allowed: Sequence[int] | None = None, history: Sequence[int] = (0,), **fields: object) -> int:
    """The greedy choice from LOGITS, whose order is 3, 0, 2, 1, 4; checked to be what a draw may give."""
    mask = None if allowed is None else numpy.isin(numpy.arange(5), list(allowed))
    tokens = []
    for more in ({}, {"temperature": 1e-3, "top_p": 0.9}):
        row = Row(SamplingParams(**fields, **more), history, 1, mask)
        (token,) = sample(LOGITS[None].clone(), [row])
        tokens.append(token.id)
    assert tokens[0] == tokens[1]
    return tokens[0]


ALL_FORBIDDEN = tuple((token, -100.0) for token in range(5))


@pytest.mark.parametrize(
    ("want", "fields"),
    [
        (3, {}),
        (4, {"logit_bias": ((4, 10.0),)}),
        (0, {"logit_bias": ((3, -1.0),)}),  # 2.1 - 1 < 1.3
        (3, {"logit_bias": ((3, -0.7),)}),  # 2.1 - 0.7 > 1.3
        (0, {"logit_bias": ((3, -100.0), (2, 0.3))}),
        (0, {"min_tokens": 1, "ending_ids": frozenset({3})}),
        (0, {"min_tokens": 2, "ending_ids": frozenset({3}), "history": [0, 1]}),
        (3, {"min_tokens": 2, "ending_ids": frozenset({3}), "history": [0, 1, 1]}),
        (3, {"min_tokens": 2}),
        (2, {"allowed": [1, 2, 4]}),
        (4, {"allowed": [4], "logit_bias": ((3, 100.0),)}),
        # The constraint comes first: where nothing else is left, what bias and minimum forbid may come.
        (1, {"allowed": [1, 4], "logit_bias": ((1, -100.0), (4, -100.0))}),
        (4, {"allowed": [1, 4], "logit_bias": ((1, -100.0),)}),
        (2, {"allowed": [2], "min_tokens": 9, "ending_ids": frozenset({2})}),
        (2, {"allowed": [2, 4], "min_tokens": 9, "ending_ids": frozenset({2}), "logit_bias": ((4, -100.0),)}),
        (3, {"logit_bias": ALL_FORBIDDEN}),
        (3, {"min_tokens": 1, "ending_ids": frozenset(range(5))}),
    ],
    ids=str,
)
def test_what_may_come(want: int, fields: dict[str, object]) -> None:
    assert choose(**fields) == want


def test_a_bias_is_no_threshold_but_added() -> None:
    """Two biases of one token add up, and a bias comes after the penalties: it is not scaled by them."""
    params = SamplingParams(repetition_penalty=2.0, logit_bias=((3, 0.4), (3, 0.1)))
    (token,) = sample(LOGITS[None].clone(), [Row(params, [3], 1)])
    assert token.id == 3  # (2.1 / 2) + 0.5 > 1.3; (2.1 + 0.5) / 2 = 1.3 would tie, and only 0.4 would lose


def test_log_probabilities_are_of_the_raw_distribution() -> None:
    params = SamplingParams(
        temperature=0.3, top_k=2, repetition_penalty=3.0, logit_bias=((1, 9.0), (3, -100.0)), logprobs=3
    )
    allowed = numpy.array([True, True, False, True, True])
    (token,) = sample(LOGITS[None].clone(), [Row(params, HISTORY, PROMPT_LENGTH, allowed)])
    assert token.id == 1
    want = LOGITS.log_softmax(-1)
    assert token.logprob == pytest.approx(float(want[token.id]), abs=1e-6)
    assert [i for i, _ in token.top] == [3, 0, 2]
    assert [value for _, value in token.top] == pytest.approx(want[[3, 0, 2]].tolist(), abs=1e-6)


def test_scores_of_given_tokens() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(5))
    tokens = BACKEND.score(BACKEND._ops.summarise(logits), [1, 6, 0], [0, 2, 7])
    want = logits.log_softmax(-1)
    for row, token in enumerate(tokens):
        assert isinstance(token, Token)
        assert token.logprob == pytest.approx(float(want[row, token.id]), abs=1e-6)
    assert [len(token.top) for token in tokens] == [0, 2, 7]


def test_seeds_and_indices_give_independent_uniform_numbers() -> None:
    for numbers in (
        [sampler.uniform(seed, 0) for seed in range(20_000)],
        [sampler.uniform(0, index) for index in range(20_000)],
        [sampler.uniform(seed << 40, seed) for seed in range(20_000)],
    ):
        tensor = torch.tensor(numbers, dtype=torch.float64)
        assert 0 <= float(tensor.min()) <= float(tensor.max()) < 1
        counts = torch.histc(tensor, bins=20, min=0, max=1)
        assert chi_square_p(counts, torch.full((20,), 0.05)) > 1e-3
        assert abs(float(torch.corrcoef(torch.stack((tensor[:-1], tensor[1:])))[0, 1])) < 0.03
    assert sampler.uniform(7, 3) == sampler.uniform(7, 3) != sampler.uniform(8, 3)
    assert sampler.uniform(1 << 64, 0) != sampler.uniform(0, 0)  # seed + choice may pass 64 bits


def test_the_last_place_with_weight_is_taken_at_the_end_of_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    monkeypatch.setattr("model.sampler.uniform", lambda seed, index: 1 - 2**-53)
    assert sample(logits, [Row(SamplingParams(temperature=1.0), [0], 1)])[0].id == 1

"""The only types that cross between the scheduler and the model: plain Python, no tensor.

A Batch is what one step computes, a StepResult what it found. Neither knows about text or HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

HOLE = 0
"""Stands in a block table for a block that was given back: an id that exists, and that nobody reads there."""


class Constraint(Protocol):
    """What may come next in one sequence (a grammar's state); the engine's thread advances it."""

    def mask(self) -> bytes:
        """Which tokens may come next: bit i of byte j for token 8 * j + i.

        Called from another thread while the model computes; tokens beyond the bytes may not come. What it
        raises, and a mask without any token, ends its own sequence only.
        """

    def advance(self, token_id: int) -> bool:
        """Take the chosen token in; gives whether the structure ended with it, so that nothing may follow."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's next token is chosen; every field is valid and set, nothing is optional.

    The steps run in this order, which is that of transformers: repetition, frequency and presence
    penalty, logit bias, what may not come (minimum of tokens, constraint), temperature, top-k, top-p,
    min-p, typical-p. Where bias and minimum would forbid everything that the constraint allows (without
    one: every token), they forbid nothing in that row: the structure comes before them.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least p times as likely as the most likely one; 0 keeps all."""
    typical_p: float = 1.0
    """Keep the smallest set of tokens closest to the expected information whose probability reaches p
    (arXiv:2202.00666); 1 keeps all."""
    repetition_penalty: float = 1.0
    """Divides (or, if negative, multiplies) the logits of tokens in prompt or output; 1 is off."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the output."""
    presence_penalty: float = 0.0
    """Subtracted once for each token that occurs in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit); -100 and less forbid the token."""
    min_tokens: int = 0
    """Output tokens before any of `ending_ids` may be chosen."""
    ending_ids: frozenset[int] = frozenset()
    """Tokens that would end the output: EOS and stop tokens."""
    seed: int = 0
    """Together with the index of the output token it determines the random draw."""
    logprobs: int | None = None
    """None: no log-probabilities; n: the chosen token's and those of the n most likely."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for each prompt token after the first."""
    is_plain: bool = field(init=False, repr=False, compare=False)
    """Whether the most likely token is chosen, whatever came before."""

    def __post_init__(self) -> None:
        assert self.temperature >= 0 and self.top_k >= 0
        assert 0 < self.top_p <= 1 and 0 <= self.min_p <= 1 and self.repetition_penalty > 0
        assert 0 < self.typical_p <= 1 and self.min_tokens >= 0
        greedy = self.temperature == 0 or self.top_k == 1
        changed = self.has_penalty or self.logit_bias or (self.min_tokens and self.ending_ids)
        object.__setattr__(self, "is_plain", greedy and not changed)

    @property
    def has_penalty(self) -> bool:
        """Whether the request's own history changes its logits."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)


@dataclass(slots=True)  # frozen, it would take five times as long to make, for each sequence at each step
class Chunk:
    """One sequence's share of a step: the tokens from `start` up to `start + count`. Nobody changes it.

    A decode is a chunk of one token, with guesses of what follows after it; a part of a prefill is a
    longer one.
    """

    request_id: str
    token_ids: Sequence[int]
    """All tokens of the sequence, prompt and output; the chunk is a window on it."""
    start: int
    """Position of the chunk's first token: so many tokens have their keys and values in the cache."""
    count: int
    block_tables: Sequence[Sequence[int]]
    """By cache group (config.py) its blocks in order of position, which cover `start + count` tokens.

    In a group with a window those that no row of the chunk sees may be given back already (HOLE).
    """
    prompt_length: int
    params: SamplingParams
    constraint: Constraint | None = None
    adapter: int = 0
    """Number of the adapter that its rows are computed with, from 1; 0 is the model itself."""
    guesses: int = 0
    """So many of the last tokens are no tokens of the sequence yet: each becomes one if all before it did
    and the row before it chooses the same."""

    def __post_init__(self) -> None:
        assert self.count > self.guesses >= 0 and 0 <= self.start <= len(self.token_ids) - self.count
        assert not self.guesses or (self.samples and self.constraint is None)

    @property
    def stop(self) -> int:
        """Position after the chunk's last token."""
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the end of the sequence, so that next tokens are chosen."""
        return self.stop == len(self.token_ids)


class Copy(NamedTuple):
    """A cache block to be copied, keys and values of all layers of its group."""

    group: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything that one step computes."""

    chunks: tuple[Chunk, ...]
    copies: tuple[Copy, ...] = ()
    """To be made before anything is computed."""

    def __post_init__(self) -> None:
        assert self.chunks
        sources = {(copy.group, copy.source) for copy in self.copies}
        assert sources.isdisjoint((copy.group, copy.target) for copy in self.copies)
        assert len({chunk.request_id for chunk in self.chunks}) == len(self.chunks)

    @property
    def num_tokens(self) -> int:
        """Rows that the step computes."""
        return sum(chunk.count for chunk in self.chunks)

    @property
    def num_guesses(self) -> int:
        """Those of them that are computed for guesses."""
        return sum(chunk.guesses for chunk in self.chunks)


class Token(NamedTuple):
    """One token with its log-probability under the raw distribution (before any penalty or mask)."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their log-probabilities, best first."""


class ChunkResult(NamedTuple):
    """What a step found for one chunk."""

    next_tokens: tuple[Token, ...] = ()
    """The chosen tokens, if the chunk samples: the guesses that came true, and one more."""
    prompt_tokens: tuple[Token, ...] = ()
    """Scored prompt tokens, if asked for: those that the chunk's rows predict."""
    error: str | None = None
    """Why no token could be chosen, where the chunk samples; its own fault, not the step's."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One result a chunk, in the batch's order."""

    results: tuple[ChunkResult, ...]

    @property
    def num_accepted(self) -> int:
        """Guesses that came true."""
        return sum(len(result.next_tokens[1:]) for result in self.results)

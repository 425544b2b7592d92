"""Guesses what follows by a smaller model of the same vocabulary, which has a cache and blocks of its own.

Each sequence has a twin here, whose tokens are brought in line with the sequence's before it guesses on.
Short memory, or a text beyond the model's length, costs guesses only.
"""

from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from itertools import takewhile

from model.batch import Batch, Chunk, SamplingParams
from server.engine.block_tables import BlockTables
from server.engine.engine import StepRunner
from server.engine.request import Request, Sequence

FIRST_CHANCE = 0.7
"""Of a guess, before any was made; what was not tried for long comes back to it."""
OWN, COMMON, FORGET = 0.1, 0.02, 0.01
"""Weights of the newest guess in a sequence's experience and in that with which others begin; how much
nearer to the first chance a step without guesses brings a sequence's."""


@dataclass(slots=True)
class Twin:
    """The small model's side of a sequence."""

    sequence: Sequence
    known: int
    """So many of its tokens are the sequence's; guesses follow."""
    chance: float
    """Of a guess to come true."""
    guesses: tuple[int, ...] = ()
    """The last ones made."""


class DraftModel:
    """Runs ahead greedily, all sequences together, a row each; at most `rows` to catch up with a text."""

    name = "draft-model"
    computes = True

    def __init__(
        self,
        runner: StepRunner,
        tables: BlockTables,
        *,
        most: int,
        rows: int,
        max_length: int,
        vocab_size: int,
    ) -> None:
        self._runner = runner
        self._tables = tables
        self._most = most
        self._rows = rows
        self._max_length = max_length
        self._vocab_size = vocab_size
        self._twins: dict[Sequence, Twin] = {}
        self._chance = FIRST_CHANCE

    def chances(self, sequences: Sequences[Sequence]) -> list[list[float]]:
        """For each the chances of its next guesses; the twins of others give their blocks back."""
        decoding = set(sequences)
        for gone in [one for one in self._twins if one not in decoding]:
            self._tables.free(self._twins.pop(gone).sequence)
        return [self._chances(one) for one in sequences]

    def guess(self, counts: dict[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        """So many tokens each, as far as the twins have caught up and find blocks."""
        ahead = {one: self._twins[one] for one in counts}
        while chunks := self._share_out(ahead):
            step = self._runner.execute(Batch(tuple(chunks.values())))
            for (one, chunk), result in zip(chunks.items(), step.results, strict=True):
                twin = ahead[one]
                twin.sequence.num_computed = chunk.stop
                new = [token.id for token in result.next_tokens if token.id < self._vocab_size]
                twin.sequence.token_ids += new
                twin.guesses += tuple(new)
                # Who has not caught up in the first pass does not hold the others up with a second one.
                if not new or len(twin.guesses) == counts[one]:
                    del ahead[one]
        return {one: twin.guesses for one in counts if (twin := self._twins[one]).guesses}

    def _share_out(self, ahead: dict[Sequence, Twin]) -> dict[Sequence, Chunk]:
        """The chunks of a pass; who gets no rows or no blocks is left behind."""
        chunks: dict[Sequence, Chunk] = {}
        rows = self._rows
        for one, twin in list(ahead.items()):
            share = min(twin.sequence.num_pending, rows)
            if share and self._tables.reserve(twin.sequence, share):
                chunks[one] = self._chunk(twin.sequence, share)
                rows -= share
            else:
                del ahead[one]
        return chunks

    def _chances(self, one: Sequence) -> list[float]:
        most = min(self._most, one.most_guesses, self._max_length - len(one.token_ids))
        if most <= 0:
            return []
        twin = self._twins.get(one)
        if twin is None:
            request = one.request
            own = Sequence(Request(request.id, request.prompt_ids, SamplingParams(), request.max_tokens))
            own.token_ids[:] = one.token_ids
            if not self._tables.start(own):
                return []
            twin = self._twins[one] = Twin(own, len(own.token_ids), self._chance)
        self._learn(twin, one.token_ids)
        self._follow(twin, one.token_ids)
        if max(one.token_ids[twin.sequence.num_computed :]) >= self._vocab_size:
            return []  # the small model does not know the token
        return [twin.chance] * most

    def _learn(self, twin: Twin, token_ids: Sequences[int]) -> None:
        """See which of the last guesses came true."""
        if not twin.guesses:
            twin.chance += FORGET * (FIRST_CHANCE - twin.chance)
        for guess, token in zip(twin.guesses, token_ids[twin.known :], strict=False):
            right = guess == token
            twin.chance += OWN * (right - twin.chance)
            self._chance += COMMON * (right - self._chance)
            if not right:
                break
        twin.guesses = ()

    def _follow(self, twin: Twin, token_ids: Sequences[int]) -> None:
        """Take the sequence's tokens over; from the first that was guessed otherwise, nothing is computed."""
        own = twin.sequence
        new = zip(own.token_ids[twin.known :], token_ids[twin.known :], strict=False)
        same = twin.known + sum(takewhile(bool, (guess == token for guess, token in new)))
        own.token_ids[same:] = token_ids[same:]
        own.num_computed = min(own.num_computed, same, len(token_ids) - 1)
        twin.known = len(token_ids)
        self._tables.advance(own)

    def _chunk(self, own: Sequence, share: int) -> Chunk:
        return Chunk(
            request_id=own.request.id,
            token_ids=own.token_ids,
            start=own.num_computed,
            count=share,
            block_tables=own.block_tables,
            prompt_length=own.prompt_length,
            params=own.request.params,
        )
